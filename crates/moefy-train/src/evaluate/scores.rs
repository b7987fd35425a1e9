//! What one forward pass knows about the whole dial: from the scores of its tokens, the mean width at any sensitivity.
//!
//! A token stops at the first expert whose logit reaches the threshold `θ`, so it goes beyond expert `e` where `θ` exceeds
//! the largest logit of the experts up to `e`. The mean width of a layer is a sum of steps:
//!
//! ```text
//! width(θ) = H_0 / I + Σ_e (H_{e+1} - H_e) / I · share of tokens with max(logit_0 … logit_e) < θ
//! ```
//!
//! That holds for the inputs of that pass. At another `θ`, earlier layers would hand other inputs to later ones.

use anyhow::Result;
use dynamoe::Routes;
use dynamoe::router::{choose, logit};
use dynamoe_model::RoutedModel;
use rayon::prelude::*;

use super::score::{BatchScore, batch_score, combine};
use crate::data::PaddedBatch;
use crate::ranks::Ranks;

/// The scores of some tokens in one forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The mean width that was used.
    pub width: f64,
    /// `H_e / I` of each expert.
    shares: Vec<f64>,
    /// For each layer and each expert `e` but the largest: `max(logit_0 … logit_e)` of all tokens, ascending.
    largest: Vec<Vec<Vec<f32>>>,
}

impl Scores {
    /// Scores of tokens: `largest` as in [`Scores`], in any order.
    pub fn new(width: f64, shares: Vec<f64>, mut largest: Vec<Vec<Vec<f32>>>) -> Self {
        largest.iter_mut().flatten().for_each(|logits| logits.sort_by(f32::total_cmp));
        Self { width, shares, largest }
    }

    /// Runs `model` on `batches` with one sensitivity for each layer. Batches run in parallel and on all ranks.
    ///
    /// # Errors
    /// No tokens to measure on; a token outside the vocabulary.
    pub fn measure(
        model: &RoutedModel,
        batches: &[PaddedBatch],
        sensitivity: &[f64],
        ranks: &dyn Ranks,
    ) -> Result<Self> {
        let own = ranks.own(batches.len());
        let own = own.par_iter().map(|&index| of_batch(model, &batches[index], sensitivity));
        let own: Vec<(BatchScore, Vec<Vec<Vec<f32>>>)> = own.collect::<Result<_>>()?;
        let (scores, logits): (Vec<_>, Vec<_>) = own.into_iter().unzip();
        let scores: Vec<Vec<f64>> = scores.iter().map(BatchScore::numbers).collect();
        let scores = ranks.all_gather_own(batches.len(), &scores);
        let shares = model.config().width_shares();
        let mut largest = vec![vec![Vec::new(); shares.len() - 1]; sensitivity.len()];
        for (layer, experts) in largest.iter_mut().enumerate() {
            for (expert, all) in experts.iter_mut().enumerate() {
                let wide =
                    |batch: &Vec<Vec<Vec<f32>>>| batch[layer][expert].iter().map(|&x| f64::from(x)).collect();
                let own: Vec<Vec<f64>> = logits.iter().map(wide).collect();
                let found = ranks.all_gather_own(batches.len(), &own);
                all.extend(found.into_iter().flatten().map(|logit| logit as f32));
            }
        }
        let parts = scores.iter().map(|numbers| BatchScore::of_numbers(numbers)).collect();
        Ok(Self::new(combine(parts)?.mean_width(), shares, largest))
    }

    /// The mean width of all layers if their threshold were `logit` and their inputs the same.
    pub fn width_at(&self, logit: f64) -> f64 {
        let layers = self.largest.iter().map(|layer| self.layer_width(layer, logit as f32));
        layers.sum::<f64>() / self.largest.len().max(1) as f64
    }

    fn layer_width(&self, layer: &[Vec<f32>], threshold: f32) -> f64 {
        let steps = layer.iter().zip(self.shares.windows(2)).map(|(largest, shares)| {
            let beyond = largest.partition_point(|&logit| logit < threshold);
            (shares[1] - shares[0]) * beyond as f64 / largest.len().max(1) as f64
        });
        self.shares[0] + steps.sum::<f64>()
    }
}

/// A batch's widths, and for each layer and expert its tokens' largest logits.
fn of_batch(
    model: &RoutedModel,
    batch: &PaddedBatch,
    sensitivity: &[f64],
) -> Result<(BatchScore, Vec<Vec<Vec<f32>>>)> {
    let (tokens, _, _) = batch.tensors(model.device())?;
    let (mut routes, mut largest) = (Vec::new(), Vec::new());
    let smaller = model.widths().len() - 1;
    model.backbone().forward(&tokens, &mut |layer, x| {
        let ffn = &model.ffns()[layer];
        let logits = ffn.router().logits(x)?.to_vec2::<f32>()?; // (N, E-1)
        let of_layer = match sensitivity[layer] {
            s if s >= 1.0 => Routes(vec![smaller; logits.len()]),
            s => Routes(logits.iter().map(|row| choose(row, logit(s))).collect()),
        };
        largest.push(running_maxima(&logits, &batch.weights, smaller));
        let y = ffn.forward_with(x, &of_layer)?;
        routes.push(of_layer);
        Ok(y)
    })?;
    Ok((batch_score(model, batch, &vec![0.0; batch.tokens.len()], &routes), largest))
}

/// `max(logit_0 … logit_e)` for each `e`, of the rows whose weight is above 0.
fn running_maxima(logits: &[Vec<f32>], weights: &[f32], smaller: usize) -> Vec<Vec<f32>> {
    let mut largest = vec![Vec::with_capacity(logits.len()); smaller];
    for (row, _) in logits.iter().zip(weights).filter(|(_, weight)| **weight > 0.0) {
        let mut max = f32::NEG_INFINITY;
        for (largest, &logit) in largest.iter_mut().zip(row) {
            max = max.max(logit); // a score that is not a number reaches no threshold
            largest.push(max);
        }
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_follow_the_rule_of_inference() {
        let rows = vec![vec![0.5, -1.0], vec![-2.0, f32::NAN], vec![-1.0, 3.0], vec![9.0, 9.0]];
        let weights = [1.0, 1.0, 1.0, 0.0]; // the last row is padding
        let shares = vec![0.25, 0.5, 1.0];
        let scores = Scores::new(0.0, shares.clone(), vec![running_maxima(&rows, &weights, 2)]);
        for threshold in [-3.0, -2.0, -1.5, -1.0, 0.0, 0.5, 2.0, 3.0, 4.0] {
            let width: f64 = rows[..3].iter().map(|row| shares[choose(row, threshold)]).sum();
            let found = scores.width_at(f64::from(threshold));
            assert!((found - width / 3.0).abs() < 1e-12, "{threshold}: {found} {width}");
        }
    }
}

//! The loss of a model on batches of text under a routing policy, and the widths it used.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use dynamoe::Routes;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::sparsity::{self, Thresholds};
use crate::data::{PaddedBatch, scored_by_others};
use crate::progress::Progress;
use crate::random::{draw, in_step, widths_with_mean};
use crate::ranks::Ranks;
use dynamoe_model::RoutedModel;

/// How tokens get their widths.
#[derive(Debug, Clone, Copy)]
pub enum Policy<'a> {
    /// From the model's routers, at one sensitivity for each layer.
    Dial(&'a [f64]),
    /// As [`Policy::Dial`], then shuffled among the tokens of each batch and layer. Routers then decide how many tokens are
    /// wide, but not which.
    Shuffled(&'a [f64]),
    /// Drawn at random for each token and layer.
    Random {
        /// Their mean, as a share of the dense width.
        mean: f64,
        /// Seed of the draws.
        seed: u64,
    },
    /// A dense model's FFNs without the small entries of their inputs ([`sparsity`]). A token's width is the share of the
    /// FFN's weights that it keeps.
    Sparse(&'a Thresholds),
}

/// The loss of one item: a document, a packed sequence or a sentence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ItemLoss {
    /// Which item, as [`PaddedBatch::items`] numbers it.
    pub item: usize,
    /// Sum over its tokens, nats.
    pub loss: f64,
    /// Tokens scored.
    pub tokens: usize,
}

/// Loss and widths of a model on some text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Mean loss, nats per token.
    pub loss: f64,
    /// Its standard error over items.
    pub stderr: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Mean width of each layer as a share of the dense width.
    pub width_per_layer: Vec<f64>,
    /// Every item.
    pub items: Vec<ItemLoss>,
}

impl Score {
    /// Mean width over layers.
    pub fn mean_width(&self) -> f64 {
        self.width_per_layer.iter().sum::<f64>() / self.width_per_layer.len().max(1) as f64
    }
}

/// A batch's part of a [`Score`].
#[derive(Debug, Clone)]
pub struct BatchScore {
    /// Each row's loss.
    pub items: Vec<ItemLoss>,
    /// For each layer: the sum of the widths, as shares of the dense width, over scored tokens.
    pub widths: Vec<f64>,
}

impl BatchScore {
    /// As plain numbers, for other ranks.
    pub fn numbers(&self) -> Vec<f64> {
        let items = self.items.iter().flat_map(|item| [item.item as f64, item.loss, item.tokens as f64]);
        [self.items.len() as f64].into_iter().chain(items).chain(self.widths.iter().copied()).collect()
    }

    /// Takes back [`BatchScore::numbers`].
    pub fn of_numbers(numbers: &[f64]) -> Self {
        let (items, widths) = numbers[1..].split_at(3 * numbers[0] as usize);
        let item = |n: &[f64]| ItemLoss { item: n[0] as usize, loss: n[1], tokens: n[2] as usize };
        Self { items: items.chunks_exact(3).map(item).collect(), widths: widths.to_vec() }
    }
}

/// Measures `model` on `batches`. Batches run in parallel and on all ranks, which does not change the result. `progress`
/// counts the tokens that are scored.
///
/// # Errors
/// No tokens to score.
pub fn score(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    policy: &Policy<'_>,
    progress: &Progress,
    ranks: &dyn Ranks,
) -> Result<Score> {
    let own = ranks.own(batches.len());
    let parts = own
        .par_iter()
        .map(|&index| {
            let part = score_batch(model, &batches[index], index as u64, policy)?.numbers();
            progress.add(batches[index].scored() as u64);
            Ok(part)
        })
        .collect::<Result<Vec<_>>>()?;
    let parts = ranks.all_gather_own(batches.len(), &parts);
    progress.add(scored_by_others(batches, &own));
    combine(parts.iter().map(|numbers| BatchScore::of_numbers(numbers)).collect())
}

/// Adds batches up.
///
/// # Errors
/// No tokens to score.
pub fn combine(parts: Vec<BatchScore>) -> Result<Score> {
    let mut widths = vec![0.0; parts.first().map_or(0, |part| part.widths.len())];
    let mut items = Vec::new();
    for part in parts {
        widths.iter_mut().zip(&part.widths).for_each(|(sum, w)| *sum += w);
        items.extend(part.items);
    }
    items.sort_by_key(|item| item.item);
    let tokens: usize = items.iter().map(|item| item.tokens).sum();
    ensure!(tokens > 0, "no tokens to score: expected at least one document of two tokens");
    let loss = items.iter().map(|item| item.loss).sum::<f64>() / tokens as f64;
    // the error of a ratio of sums over independent items
    let squares: f64 = items.iter().map(|item| (item.loss - loss * item.tokens as f64).powi(2)).sum();
    let n = items.len() as f64;
    let stderr = if items.len() > 1 { (squares * n / (n - 1.0)).sqrt() / tokens as f64 } else { f64::NAN };
    let width_per_layer = widths.iter().map(|sum| sum / tokens as f64).collect();
    Ok(Score { loss, stderr, tokens, width_per_layer, items })
}

fn score_batch(
    model: &RoutedModel,
    batch: &PaddedBatch,
    index: u64,
    policy: &Policy<'_>,
) -> Result<BatchScore> {
    let (tokens, targets, weights) = batch.tensors(model.device())?;
    let (hidden, routes) = match policy {
        Policy::Sparse(thresholds) => {
            let (hidden, kept) = sparsity::forward(model, &tokens, thresholds)?;
            return Ok(of_widths(batch, &token_losses(model, &hidden, &targets, &weights)?, &kept));
        }
        Policy::Dial(sensitivity) => model.forward(&tokens, sensitivity)?,
        Policy::Shuffled(sensitivity) => {
            let (_, mut routes) = model.forward(&tokens, sensitivity)?;
            for (layer, routes) in routes.iter_mut().enumerate() {
                shuffle_scored(&mut routes.0, &batch.weights, &mut in_step(0, index, layer as u64));
            }
            (model.forward_with(&tokens, &routes)?, routes)
        }
        Policy::Random { mean, seed } => {
            let rng = |layer: usize| in_step(*seed, index, layer as u64);
            let routes = random_routes(model, batch.tokens.len(), *mean, rng);
            (model.forward_with(&tokens, &routes)?, routes)
        }
    };
    let losses = token_losses(model, &hidden, &targets, &weights)?;
    Ok(batch_score(model, batch, &losses, &routes))
}

/// The loss of each token, times its weight.
pub fn token_losses(
    model: &RoutedModel,
    hidden: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<Vec<f32>> {
    let losses = model.backbone().losses(hidden, &targets.flatten_all()?, &weights.flatten_all()?)?;
    Ok(losses.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()?)
}

/// Sums up a batch's losses and widths over its scored tokens.
pub fn batch_score(
    model: &RoutedModel,
    batch: &PaddedBatch,
    losses: &[f32],
    routes: &[Routes],
) -> BatchScore {
    let shares = model.config().width_shares();
    let of_layer = |routes: &Routes| routes.0.iter().map(|&expert| shares[expert]).collect();
    of_widths(batch, losses, &routes.iter().map(of_layer).collect::<Vec<_>>())
}

/// The same for the width of each layer and token.
fn of_widths(batch: &PaddedBatch, losses: &[f32], widths: &[Vec<f64>]) -> BatchScore {
    let scored = |n: &usize| batch.weights[*n] > 0.0;
    let of_layer = |widths: &Vec<f64>| (0..widths.len()).filter(scored).map(|n| widths[n]).sum();
    let items = batch.items.iter().enumerate().map(|(row, &item)| {
        let range = row * batch.length..(row + 1) * batch.length;
        let loss = losses[range.clone()].iter().map(|&l| f64::from(l)).sum();
        ItemLoss { item, loss, tokens: range.filter(scored).count() }
    });
    BatchScore { items: items.collect(), widths: widths.iter().map(of_layer).collect() }
}

/// Shuffles the entries whose weight is above 0. Those of padding stay.
fn shuffle_scored(routes: &mut [usize], weights: &[f32], rng: &mut impl Rng) {
    let scored: Vec<usize> = (0..weights.len()).filter(|&n| weights[n] > 0.0).collect();
    let mut values: Vec<usize> = scored.iter().map(|&n| routes[n]).collect();
    values.shuffle(rng);
    scored.into_iter().zip(values).for_each(|(n, value)| routes[n] = value);
}

/// Random routes whose mean width is `mean`; `rng` gives each layer its generator.
fn random_routes(
    model: &RoutedModel,
    tokens: usize,
    mean: f64,
    rng: impl Fn(usize) -> ChaCha8Rng,
) -> Vec<Routes> {
    let table = widths_with_mean(&model.config().width_shares(), mean);
    let of_layer = |layer| {
        let mut rng = rng(layer);
        Routes((0..tokens).map(|_| draw(&table, &mut rng)).collect())
    };
    (0..model.config().num_hidden_layers).map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffling_keeps_the_scored_widths_and_leaves_padding_alone() {
        let mut routes: Vec<usize> = (0..100).collect();
        let weights: Vec<f32> = (0..100).map(|n| f32::from(u8::from(n % 3 > 0))).collect();
        shuffle_scored(&mut routes, &weights, &mut in_step(1, 2, 3));
        assert!((0..100).step_by(3).all(|n| routes[n] == n));
        assert!((0..100).any(|n| routes[n] != n));
        routes.sort();
        assert!(routes.into_iter().eq(0..100));
    }
}

//! Sample texts for a report, token by token, with the width that each token used.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use dynamoe::Routes;
use dynamoe_model::RoutedModel;

use super::Setting;
use super::score::token_losses;
use crate::data::{PaddedBatch, Texts};
use crate::report::results::{Sample, SampleToken};

/// How many sample texts to take, and how long they are.
#[derive(Debug, Clone, Copy)]
pub struct SampleLimits {
    /// Texts.
    pub texts: usize,
    /// Tokens of each text at most.
    pub tokens: usize,
}

/// Sample texts from held-out batches, each at every one of `settings`.
///
/// # Errors
/// A batch without a document.
pub fn samples(
    model: &RoutedModel,
    texts: &Texts,
    batches: &[PaddedBatch],
    settings: &[Setting],
    limits: SampleLimits,
) -> Result<Vec<Sample>> {
    let device = model.device();
    let mut samples = Vec::new();
    // from the middle: batches are sorted by length
    for batch in batches.iter().skip(batches.len() / 2).take(limits.texts) {
        // tokens that do not count may stand between others; padding stands at the end
        let last = batch.weights[..batch.length].iter().rposition(|&weight| weight > 0.0);
        let length = last.map_or(1, |last| last + 1).min(limits.tokens);
        let ids = &batch.tokens[..length];
        let targets = Tensor::from_slice(&batch.targets[..length], (1, length), device)?;
        let tokens = Tensor::from_slice(ids, (1, length), device)?;
        let ones = Tensor::ones((1, length), DType::F32, device)?;
        let item = batch.items.first().context("a batch holds at least one document")?;
        let pieces = texts.pieces(ids);
        for setting in settings {
            let (hidden, routes) = model.forward(&tokens, &setting.sensitivity)?;
            let losses = token_losses(model, &hidden, &targets, &ones)?;
            samples.push(Sample {
                sensitivity: setting.mean(),
                source: format!("held-out document {}", item + 1),
                tokens: sample_tokens(&pieces, &routes, &model.config().width_shares(), &losses),
            });
        }
    }
    Ok(samples)
}

/// The tokens of a text with their widths, from each layer's `routes (N)`, and with the loss of predicting them.
fn sample_tokens(pieces: &[String], routes: &[Routes], shares: &[f64], losses: &[f32]) -> Vec<SampleToken> {
    let layers = routes.len().max(1) as f64;
    let tokens = pieces.iter().enumerate().map(|(at, text)| {
        let width_per_layer: Vec<f64> = routes.iter().map(|routes| shares[routes.0[at]]).collect();
        let width = width_per_layer.iter().sum::<f64>() / layers;
        // the model predicted the token when it read the one before
        let loss = at.checked_sub(1).map(|before| f64::from(losses[before]));
        SampleToken { text: text.clone(), width, width_per_layer, loss }
    });
    tokens.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_loss_is_that_of_predicting_it() {
        let pieces = ["a", "b", "c"].map(str::to_owned);
        let routes = [Routes(vec![0, 1, 1]), Routes(vec![1, 1, 0])];
        let found = sample_tokens(&pieces, &routes, &[0.5, 1.0], &[0.1, 0.2, 0.3]);
        let losses: Vec<Option<f32>> = found.iter().map(|token| token.loss.map(|loss| loss as f32)).collect();
        assert_eq!(losses, [None, Some(0.1), Some(0.2)]);
        assert_eq!(found[0].width_per_layer, [0.5, 1.0]);
        assert_eq!([found[0].width, found[1].width, found[2].width], [0.75, 1.0, 0.75]);
    }
}

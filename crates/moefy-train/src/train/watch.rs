//! Whether the widest and the narrowest expert get better: their losses on a little text, at each checkpoint and before the
//! first step.

use anyhow::Result;
use candle_core::{DType, Device};
use dynamoe_model::ops::{ffn, reach_of};

use super::config::{TrainConfig, Trained};
use super::model::TrainModel;
use crate::data::{Batch, Batches};

/// Tokens to watch the losses on, at most.
const TOKENS: usize = 4096;
/// Errors of the mean by which a loss has to rise before that is told.
const ERRORS: f64 = 3.0;

/// The losses of a model in training, before its first step.
pub(super) struct Watch {
    batches: Vec<Batch>,
    start: Losses,
}

/// The loss of each token that counts, nats.
#[derive(Debug, Clone, PartialEq)]
struct Losses {
    /// At full width.
    widest: Vec<f64>,
    /// Of the narrowest expert.
    narrowest: Vec<f64>,
}

impl Watch {
    /// Measures `model`, which no step has changed, on the first batches that a training does not take.
    pub(super) fn start(model: &TrainModel, config: &TrainConfig, batches: &Batches) -> Result<Self> {
        let taken = config.steps() * config.accumulation() as u64;
        let count = (TOKENS / (config.micro_batch() * config.sequence_length)).max(1) as u64;
        let batches: Vec<Batch> = (taken..taken + count).map(|number| batches.batch(number)).collect();
        let start = Losses { widest: widest(model, &batches)?, narrowest: narrowest(model, &batches)? };
        Ok(Self { batches, start })
    }

    /// Tells the losses of `model` after `step` steps, and warns of one that has risen.
    pub(super) fn check(&self, model: &TrainModel, config: &TrainConfig, step: u64) -> Result<()> {
        // where dense weights stay as they are, full width does
        let dense = config.train == Trained::All;
        let now = Losses {
            widest: if dense { widest(model, &self.batches)? } else { self.start.widest.clone() },
            narrowest: narrowest(model, &self.batches)?,
        };
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let told = |now: &[f64], start: &[f64]| format!("{:.3} (at first {:.3})", mean(now), mean(start));
        tracing::info!(
            "step {step}: loss at full width {}, of the narrowest expert {}",
            told(&now.widest, &self.start.widest),
            told(&now.narrowest, &self.start.narrowest)
        );
        if has_risen(&self.start.widest, &now.widest) {
            tracing::warn!(
                "the loss at full width has risen: a smaller --lr, or --train added would keep it"
            );
        } else if has_risen(&self.start.narrowest, &now.narrowest) {
            tracing::warn!("the loss of the narrowest expert has risen: try a smaller --lr");
        }
        Ok(())
    }
}

fn widest(model: &TrainModel, batches: &[Batch]) -> Result<Vec<f64>> {
    through(model, batches, model.config().expert_widths().len() - 1)
}

fn narrowest(model: &TrainModel, batches: &[Batch]) -> Result<Vec<f64>> {
    through(model, batches, 0)
}

/// The losses of the batches' tokens that count, all of them through the same expert.
fn through(model: &TrainModel, batches: &[Batch], expert: usize) -> Result<Vec<f64>> {
    let losses = batches.iter().map(|batch| losses_of(model, batch, expert)).collect::<Result<Vec<_>>>()?;
    Ok(losses.concat())
}

/// The losses of a batch's tokens that count, all of them through the same expert. Layers run one by one, so that it takes no
/// more memory than a step.
fn losses_of(model: &TrainModel, batch: &Batch, expert: usize) -> Result<Vec<f64>> {
    let (tokens, targets, weights) = batch.tensors(model.device())?;
    let (backbone, experts) = (&model.backbone, model.config().expert_widths().len());
    let (places, rows) = (backbone.places(&tokens)?, tokens.elem_count());
    let reach = reach_of(&vec![expert; rows], experts, model.device())?;
    let mut x = backbone.embed(&tokens)?.detach();
    for layer in 0..model.ffns.len() {
        let weights = model.ffn(layer)?;
        x = backbone.layer(layer, &x, &places, &mut |x| ffn(&weights, x, &reach))?.detach();
    }
    let hidden = backbone.norm(&x)?.detach();
    let losses = backbone.losses(&hidden, &targets.flatten_all()?, &weights.flatten_all()?)?;
    let losses: Vec<f32> = losses.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()?;
    let counts = batch.weights.iter().map(|&weight| weight > 0.0);
    Ok(losses
        .into_iter()
        .zip(counts)
        .filter(|(_, counts)| *counts)
        .map(|(loss, _)| f64::from(loss))
        .collect())
}

/// Whether the mean of the same tokens' losses has risen by more than chance.
fn has_risen(start: &[f64], now: &[f64]) -> bool {
    let n = start.len() as f64;
    let differences = || start.iter().zip(now).map(|(start, now)| now - start);
    let mean = differences().sum::<f64>() / n;
    let variance = differences().map(|difference| (difference - mean).powi(2)).sum::<f64>() / (n - 1.0);
    mean > ERRORS * (variance / n).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_is_told_from_chance() {
        let start: Vec<f64> = (0..100).map(|token| f64::from(token % 7)).collect();
        let moved = |by: fn(usize) -> f64| -> Vec<f64> {
            start.iter().enumerate().map(|(token, loss)| loss + by(token)).collect()
        };
        assert!(!has_risen(&start, &start));
        assert!(has_risen(&start, &moved(|_| 0.01)));
        assert!(!has_risen(&start, &moved(|_| -0.01)));
        // up and down by 1: an error of 0.1
        let noisy = |token: usize| if token.is_multiple_of(2) { 1.0 } else { -1.0 };
        assert!(!has_risen(&start, &moved(|token| if token.is_multiple_of(2) { 1.2 } else { -0.8 })));
        assert!(has_risen(&start, &moved(|token| if token.is_multiple_of(2) { 1.4 } else { -0.6 })));
        assert!(!has_risen(&start, &start.iter().enumerate().map(|(t, l)| l + noisy(t)).collect::<Vec<_>>()));
    }
}

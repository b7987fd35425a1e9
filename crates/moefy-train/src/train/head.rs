//! The output matrix and the losses on its logits, in blocks of tokens.

use anyhow::Result;
use candle_core::{Tensor, Var};
use dynamoe_model::ops::{Gradients, cross_entropy};

use super::config::TrainConfig;
use super::model::TrainModel;
use super::targets::{Block, Targets};
use super::teacher::{TeacherOutputs, relative_error};

/// Bytes of a block's logits. A block has several tensors of this size at a time.
const BLOCK_BYTES: usize = 32 << 20;
/// Tokens of a block at least: each block reads the whole output matrix.
const LEAST_ROWS: usize = 32;

/// Tokens of a block for a vocabulary of this size.
pub(super) fn block_rows(vocab_size: usize) -> usize {
    (BLOCK_BYTES / (4 * vocab_size.max(1))).max(LEAST_ROWS)
}

/// What the head computes with.
pub(super) struct Head<'a> {
    pub(super) model: &'a TrainModel,
    pub(super) config: &'a TrainConfig,
    pub(super) teacher: Option<&'a TeacherOutputs<'a>>,
    /// Weight of the difference to the teacher's hidden states.
    pub(super) hidden_weight: f64,
}

/// The losses of the head.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HeadLosses {
    /// What is minimised.
    pub(super) objective: f64,
    /// The language-model loss, nats per token.
    pub(super) language_model: f64,
}

impl Head<'_> {
    /// Losses of `hidden (N, D)`, outside any graph, and the gradient with respect to `hidden`. Adds the gradients with
    /// respect to weights to `gradients`.
    pub(super) fn run(
        &self,
        hidden: &Tensor,
        targets: &Targets<'_>,
        gradients: &mut Gradients,
    ) -> Result<(HeadLosses, Tensor)> {
        let (n, params) = (hidden.dim(0)?, self.model.params());
        let rows = block_rows(self.model.config().vocab_size);
        let (mut losses, mut parts) = (HeadLosses::default(), Vec::new());
        for first in (0..n).step_by(rows) {
            let block = targets.block(first, rows)?;
            let hidden = Var::from_tensor(&hidden.narrow(0, first, block.tokens.dim(0)?)?)?;
            let (objective, language_model) = self.block(&hidden, &block)?;
            losses.objective += value(&objective)?;
            losses.language_model += value(&language_model)?;
            parts.push(gradients.add_through(&objective, params, &hidden)?);
        }
        let mut gradient = Tensor::cat(&parts, 0)?;
        if let Some(teacher) = self.teacher.filter(|_| self.hidden_weight > 0.0) {
            let hidden = Var::from_tensor(hidden)?;
            let error = (relative_error(&hidden, &teacher.hidden)? * self.hidden_weight)?;
            losses.objective += value(&error)?;
            gradient = (gradient + gradients.add_through(&error, params, &hidden)?)?;
        }
        Ok((losses, gradient))
    }

    /// The block's parts of what is minimised and of the language-model loss; `hidden` are its rows.
    fn block(&self, hidden: &Tensor, block: &Block) -> Result<(Tensor, Tensor)> {
        let share = self.config.distill_predictions();
        let Some(teacher) = self.teacher.filter(|_| share > 0.0) else {
            let losses = self.model.backbone.losses(hidden, &block.tokens, &block.weights)?;
            let loss = block.mean(&losses)?;
            return Ok((loss.clone(), loss));
        };
        let logits = self.model.backbone.logits(hidden)?;
        let loss = block.mean(&cross_entropy(&logits, &block.tokens, &block.weights)?)?;
        let shift = block.mean(&teacher.shift(&logits, block)?)?;
        Ok(((&loss + (shift * share)?)?, loss))
    }
}

/// The number of a scalar.
fn value(scalar: &Tensor) -> Result<f64> {
    Ok(f64::from(scalar.to_scalar::<f32>()?))
}

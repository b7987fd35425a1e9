//! The losses of one batch.

use anyhow::Result;
use candle_core::{DType, Tensor};
use dynamoe_model::RoutedModel;
use dynamoe_model::ops::ffn;

use super::config::TrainConfig;
use super::model::TrainModel;
use super::teacher::{TeacherOutputs, relative_error};
use crate::methods::{LayerInput, Objective};
use crate::random::in_step;

/// A batch on the device.
pub struct StepBatch {
    /// (B, T), u32.
    pub tokens: Tensor,
    /// The token after each, (B, T), u32.
    pub targets: Tensor,
}

/// What a batch's losses depend on besides the weights and the batch.
pub struct StepContext<'a> {
    /// How tokens are routed.
    pub objective: &'a dyn Objective,
    /// The dense model, where its predictions are a target.
    pub teacher: Option<&'a RoutedModel>,
    /// Settings.
    pub config: &'a TrainConfig,
    /// Number of the step, from 0.
    pub step: u64,
    /// Number of the batch within the step.
    pub micro: u64,
}

impl StepContext<'_> {
    /// The part of the step's random stream that draws the dials: no layer has this number.
    const DIALS: usize = 0xF_FFFF;

    fn rng(&self, part: usize) -> rand_chacha::ChaCha8Rng {
        in_step(self.config.seed, self.step, self.micro << 20 | part as u64)
    }
}

/// The losses of one batch, each a scalar of the graph.
pub struct StepLoss {
    /// What is minimised.
    pub objective: Tensor,
    /// The language-model loss alone, nats per token.
    pub language_model: Tensor,
    /// Mean FFN width used by each sequence, as a share of the dense width: (B).
    pub widths: Vec<f32>,
    /// Each sequence's dial: (B).
    pub dials: Vec<f64>,
}

impl TrainModel {
    /// The losses of one batch: the language model's, and what distillation and the objective add.
    ///
    /// # Errors
    /// A batch that does not fit the model.
    pub fn loss(&self, batch: &StepBatch, context: &StepContext<'_>) -> Result<StepLoss> {
        let (sequences, _) = batch.tokens.dims2()?;
        let config = context.config;
        let dials = context.objective.sample(&mut context.rng(StepContext::DIALS), sequences);
        let teacher =
            context.teacher.map(|teacher| TeacherOutputs::new(teacher, &batch.tokens)).transpose()?;
        let shares = Tensor::new(self.shell_shares(), batch.tokens.device())?;
        let (mut objective_losses, mut widths, mut hidden_errors) = (Vec::new(), Vec::new(), Vec::new());
        let hidden = self.backbone.forward(&batch.tokens, &mut |layer, x| {
            let logits = self.routers[layer].as_ref().map(|router| router.logits(x)).transpose()?;
            let weights = &self.ffns[layer];
            if let Some(teacher) = teacher.as_ref().filter(|_| config.distill_hidden() > 0.0 && layer > 0) {
                hidden_errors.push(relative_error(x, &teacher.inputs[layer])?);
            }
            let mut rng = context.rng(layer);
            let routed = context.objective.route(LayerInput {
                x,
                logits: logits.as_ref(),
                ffn: weights,
                dials: &dials,
                rng: &mut rng,
            })?;
            objective_losses.extend(routed.loss);
            let reach = routed.reach.detach().reshape((sequences, (), shares.dim(0)?))?;
            widths.push(reach.mean(1)?.broadcast_mul(&shares)?.sum(1)?); // (B)
            ffn(weights, x, &routed.reach)
        })?;
        let targets = batch.targets.flatten_all()?;
        let ones = Tensor::ones(targets.dim(0)?, DType::F32, targets.device())?;
        let language_model = self.backbone.losses(&hidden, &targets, &ones)?.mean_all()?;
        let mut total = language_model.clone();
        if let Some(teacher) = &teacher {
            if config.distill_predictions() > 0.0 {
                let logits = self.backbone.logits(&hidden)?;
                total = (total + (teacher.shift(&logits, &targets)? * config.distill_predictions())?)?;
            }
            if config.distill_hidden() > 0.0 {
                hidden_errors.push(relative_error(&hidden, &teacher.hidden)?);
                let error = Tensor::stack(&hidden_errors, 0)?.mean_all()?;
                total = (total + (error * config.distill_hidden())?)?;
            }
        }
        if !objective_losses.is_empty() {
            total = (total + Tensor::stack(&objective_losses, 0)?.mean_all()?)?;
        }
        Ok(StepLoss {
            objective: total,
            language_model: language_model.detach(),
            widths: Tensor::stack(&widths, 0)?.mean(0)?.to_vec1()?,
            dials,
        })
    }
}

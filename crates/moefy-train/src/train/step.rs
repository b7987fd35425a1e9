//! The losses of one batch and their gradients.
//!
//! The head (output matrix and losses) runs by itself, in blocks of tokens: its logits are the largest tensors of a step,
//! and the gradient with respect to the hidden states is all that the layers need of it. The layers run backward at once,
//! or one by one, each computed again from its input: then only the inputs of layers are kept.

use anyhow::Result;
use candle_core::{Result as CandleResult, Tensor, Var};
use dynamoe_model::model::Places;
use dynamoe_model::ops::{Gradients, ffn};

use super::config::TrainConfig;
use super::head::{Head, HeadLosses};
use super::model::TrainModel;
use super::targets::Targets;
use super::teacher::{Teacher, TeacherOutputs, relative_error};
use crate::methods::{LayerInput, Objective};
use crate::random::in_step;

/// A batch on the device.
pub struct StepBatch {
    /// (B, T), u32.
    pub tokens: Tensor,
    /// The token after each, (B, T), u32.
    pub targets: Tensor,
    /// 1 for a target that counts and 0 for one that the head's losses leave out, (B, T), f32. What layers add to the loss,
    /// and hidden states, count everywhere: later tokens attend to these positions.
    pub weights: Tensor,
    /// What the sum of the targets' losses is divided by: how many count, or for one of several batches in a step, how many
    /// count in each of them in the mean.
    pub counted: f64,
}

/// What a batch's losses depend on besides the weights and the batch.
pub struct StepContext<'a> {
    /// How tokens are routed.
    pub objective: &'a dyn Objective,
    /// The dense model, where its predictions are a target.
    pub teacher: Option<Teacher<'a>>,
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

/// The losses of one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct StepLoss {
    /// What is minimised.
    pub objective: f64,
    /// The language-model loss alone, nats per token that counts.
    pub language_model: f64,
    /// Mean FFN width used by each sequence, as a share of the dense width: (B).
    pub widths: Vec<f32>,
    /// Each sequence's dial: (B).
    pub dials: Vec<f64>,
}

impl StepLoss {
    /// As plain numbers, for other ranks.
    pub(super) fn numbers(&self) -> Vec<f64> {
        let widths = self.widths.iter().map(|&width| f64::from(width));
        [self.objective, self.language_model]
            .into_iter()
            .chain(self.dials.iter().copied())
            .chain(widths)
            .collect()
    }

    /// Takes back [`StepLoss::numbers`].
    pub(super) fn of_numbers(numbers: &[f64]) -> Self {
        let (dials, widths) = numbers[2..].split_at((numbers.len() - 2) / 2);
        Self {
            objective: numbers[0],
            language_model: numbers[1],
            widths: widths.iter().map(|&width| width as f32).collect(),
            dials: dials.to_vec(),
        }
    }
}

impl TrainModel {
    /// Computes the losses of one batch: the language model's, and what distillation and the objective add. Adds their
    /// gradients to `gradients`.
    ///
    /// # Errors
    /// A batch that does not fit the model.
    pub fn accumulate(
        &self,
        batch: &StepBatch,
        context: &StepContext<'_>,
        gradients: &mut Gradients,
    ) -> Result<StepLoss> {
        let (sequences, _) = batch.tokens.dims2()?;
        let teacher = match context.teacher {
            Some(teacher) => Some(TeacherOutputs::new(teacher, self, &batch.tokens)?),
            None => None,
        };
        let step = Step {
            model: self,
            batch,
            context,
            dials: context.objective.sample(&mut context.rng(StepContext::DIALS), sequences),
            shares: Tensor::new(self.shell_shares(), batch.tokens.device())?,
            places: self.backbone.places(&batch.tokens)?,
            teacher,
        };
        let (head, layers) =
            if context.config.recompute { step.by_layers(gradients)? } else { step.at_once(gradients)? };
        Ok(StepLoss {
            objective: head.objective + step.value(&layers)?,
            language_model: head.language_model,
            widths: Tensor::stack(&layers.widths, 0)?.mean(0)?.to_vec1()?,
            dials: step.dials,
        })
    }
}

/// What layers add to the loss, and their widths.
#[derive(Default)]
struct LayerParts {
    /// The objective's losses, scalars.
    objective: Vec<Tensor>,
    /// Differences to the teacher's hidden states, scalars.
    hidden: Vec<Tensor>,
    /// Mean width of each sequence, (B), of each layer.
    widths: Vec<Tensor>,
}

impl LayerParts {
    /// Lets go of the graph.
    fn detached(self) -> Self {
        let detach = |parts: Vec<Tensor>| parts.iter().map(Tensor::detach).collect();
        Self { objective: detach(self.objective), hidden: detach(self.hidden), ..self }
    }
}

/// One batch on its way.
struct Step<'a> {
    model: &'a TrainModel,
    batch: &'a StepBatch,
    context: &'a StepContext<'a>,
    dials: Vec<f64>,
    /// Each shell's share of the width.
    shares: Tensor,
    places: Places,
    teacher: Option<TeacherOutputs<'a>>,
}

impl Step<'_> {
    /// One graph for all layers.
    fn at_once(&self, gradients: &mut Gradients) -> Result<(HeadLosses, LayerParts)> {
        let backbone = &self.model.backbone;
        let mut parts = LayerParts::default();
        let mut x = backbone.embed(&self.batch.tokens)?;
        for layer in 0..self.model.ffns.len() {
            x = self.layer(layer, &x, &mut parts)?;
        }
        let hidden = backbone.norm(&x)?;
        let (losses, gradient) = self.head(&hidden, gradients)?;
        let loss = self.with_parts((&hidden * gradient)?.sum_all()?, &parts)?;
        gradients.add(&loss, self.model.params())?;
        Ok((losses, parts.detached()))
    }

    /// A graph for each layer, computed again from the layer's input when its turn comes to run backward.
    fn by_layers(&self, gradients: &mut Gradients) -> Result<(HeadLosses, LayerParts)> {
        let (backbone, params) = (&self.model.backbone, self.model.params());
        let mut parts = LayerParts::default();
        let mut inputs = Vec::with_capacity(self.model.ffns.len());
        let mut x = backbone.embed(&self.batch.tokens)?.detach();
        for layer in 0..self.model.ffns.len() {
            let next = self.layer(layer, &x, &mut parts)?.detach();
            parts = parts.detached();
            inputs.push(std::mem::replace(&mut x, next));
        }
        let last = Var::from_tensor(&x)?;
        let hidden = backbone.norm(&last)?;
        let (losses, gradient) = self.head(&hidden, gradients)?;
        let mut gradient = gradients.add_through(&(hidden * gradient)?.sum_all()?, params, &last)?;
        while let Some(x) = inputs.pop() {
            let (x, mut parts) = (Var::from_tensor(&x)?, LayerParts::default());
            let y = self.layer(inputs.len(), &x, &mut parts)?;
            let loss = self.with_parts((y * gradient)?.sum_all()?, &parts)?;
            gradient = gradients.add_through(&loss, params, &x)?;
        }
        let x = backbone.embed(&self.batch.tokens)?;
        if x.track_op() {
            gradients.add(&(x * gradient)?.sum_all()?, params)?;
        }
        Ok((losses, parts))
    }

    /// Runs one layer on `x (N, D)`.
    fn layer(&self, layer: usize, x: &Tensor, parts: &mut LayerParts) -> CandleResult<Tensor> {
        let context = self.context;
        self.model.backbone.layer(layer, x, &self.places, &mut |x| {
            let logits = self.model.routers[layer].as_ref().map(|router| router.logits(x)).transpose()?;
            let weights = &self.model.ffn(layer)?;
            let compared =
                self.teacher.as_ref().filter(|_| context.config.distill_hidden() > 0.0 && layer > 0);
            if let Some(teacher) = compared {
                parts.hidden.push(relative_error(x, &teacher.inputs[layer])?);
            }
            let routed = context.objective.route(LayerInput {
                x,
                logits: logits.as_ref(),
                ffn: weights,
                dials: &self.dials,
                rng: &mut context.rng(layer),
            })?;
            parts.objective.extend(routed.loss);
            let reach = routed.reach.detach().reshape((self.dials.len(), (), self.shares.dim(0)?))?;
            parts.widths.push(reach.mean(1)?.broadcast_mul(&self.shares)?.sum(1)?); // (B)
            ffn(weights, x, &routed.reach)
        })
    }

    /// Losses of `hidden (N, D)` and the gradient of all of them with respect to it.
    fn head(&self, hidden: &Tensor, gradients: &mut Gradients) -> Result<(HeadLosses, Tensor)> {
        let head = Head {
            model: self.model,
            config: self.context.config,
            teacher: self.teacher.as_ref(),
            hidden_weight: self.hidden_weight(),
        };
        let (targets, weights) = (self.batch.targets.flatten_all()?, self.batch.weights.flatten_all()?);
        let targets = Targets { tokens: &targets, weights: &weights, counted: self.batch.counted };
        head.run(&hidden.detach(), &targets, gradients)
    }

    /// Weight of one difference to the teacher's hidden states: there are as many as layers.
    fn hidden_weight(&self) -> f64 {
        self.context.config.distill_hidden() / self.model.ffns.len() as f64
    }

    /// `loss` and what layers add to it.
    fn with_parts(&self, mut loss: Tensor, parts: &LayerParts) -> CandleResult<Tensor> {
        for part in &parts.objective {
            loss = (loss + (part / self.model.ffns.len() as f64)?)?;
        }
        for part in &parts.hidden {
            loss = (loss + (part * self.hidden_weight())?)?;
        }
        Ok(loss)
    }

    /// What layers add to the loss.
    fn value(&self, parts: &LayerParts) -> CandleResult<f64> {
        let zero = Tensor::zeros((), candle_core::DType::F32, self.shares.device())?;
        Ok(f64::from(self.with_parts(zero, parts)?.to_scalar::<f32>()?))
    }
}

//! Distillation: what the dense model makes of a batch, and how far the trained one is from it.

use candle_core::{DType, Result, Tensor};
use dynamoe::TrainableFfn;
use dynamoe_model::RoutedModel;
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::ffn;

use super::model::TrainModel;
use super::targets::Block;

/// The dense model that is distilled from.
#[derive(Debug, Clone, Copy)]
pub enum Teacher<'a> {
    /// Another model.
    Other(&'a RoutedModel),
    /// The model in training, at full width: its dense weights stay as they are.
    Itself,
}

/// What the dense model makes of a batch, without gradient.
pub(super) struct TeacherOutputs<'a> {
    backbone: &'a Backbone,
    /// Input of every layer's FFN, (N, D).
    pub(super) inputs: Vec<Tensor>,
    /// After the final norm, (N, D).
    pub(super) hidden: Tensor,
}

impl<'a> TeacherOutputs<'a> {
    /// `model` is the one in training.
    pub(super) fn new(teacher: Teacher<'a>, model: &'a TrainModel, tokens: &Tensor) -> Result<Self> {
        let mut inputs = Vec::new();
        let backbone = match teacher {
            Teacher::Other(other) => other.backbone(),
            Teacher::Itself => &model.backbone,
        };
        let hidden = backbone.forward(tokens, &mut |layer, x| {
            let x = x.detach();
            let y = match teacher {
                Teacher::Other(other) => other.ffns()[layer].forward_routed(&x, &[1.0])?.0,
                Teacher::Itself => full_width(&model.ffn(layer)?, &x)?,
            };
            inputs.push(x);
            Ok(y)
        })?;
        Ok(Self { backbone, inputs, hidden: hidden.detach() })
    }

    /// [`shift`] under the dense model's predictions of a block of tokens.
    pub(super) fn shift(&self, logits: &Tensor, block: &Block) -> Result<Tensor> {
        let hidden = self.hidden.narrow(0, block.first, block.tokens.dim(0)?)?;
        // without gradient, so the fused operation may be used
        let predicted = candle_nn::ops::softmax_last_dim(&self.backbone.logits(&hidden)?)?.detach();
        shift(&predicted, logits, &block.tokens, &block.weights)
    }
}

/// The dense FFN of a layer: `x (N, D)` → `(N, D)`.
fn full_width(weights: &TrainableFfn, x: &Tensor) -> Result<Tensor> {
    let width = weights.gate_proj.dim(0)?;
    let dense = TrainableFfn { separate: None, compensation: None, widths: vec![width], ..weights.clone() };
    ffn(&dense, x, &Tensor::ones((x.dim(0)?, 1), DType::F32, x.device())?)
}

/// `weights (N)` times each token's cross entropy under predictions `(N, V)`, less that under the `targets (N)`: `(N)`. Both
/// have the same normaliser, so with `t` predicted and `y` the target, and `z` the logits, it is `z_y - Σ_v t_v z_v`.
fn shift(predicted: &Tensor, logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let target = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    (target - (predicted * logits)?.sum(1)?)? * weights
}

/// `Σ (x - y)² / Σ y²`, a scalar.
pub(super) fn relative_error(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    (x - y)?.sqr()?.sum_all()? / y.sqr()?.sum_all()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, rng};
    use candle_core::{Device, Var};
    use candle_nn::ops::{log_softmax, softmax};

    #[test]
    fn the_shift_turns_one_cross_entropy_into_the_other() {
        let mut rng = rng();
        let mut random = |columns| normal(&mut rng, 2.0, (6, columns));
        let predicted = softmax(&random(11), 1).unwrap();
        let logits = Var::from_tensor(&random(11)).unwrap();
        let targets = Tensor::new(&[0u32, 3, 10, 3, 7, 1], &Device::Cpu).unwrap();
        let log = log_softmax(logits.as_tensor(), 1).unwrap();
        let weights = Tensor::new(&[1f32, 0.0, 1.0, 1.0, 0.0, 1.0], &Device::Cpu).unwrap();
        let sum = |losses: Tensor| (losses.neg().unwrap() * &weights).unwrap().sum_all().unwrap();
        let hard = sum(log.gather(&targets.unsqueeze(1).unwrap(), 1).unwrap().squeeze(1).unwrap());
        let soft = sum((&predicted * &log).unwrap().sum(1).unwrap());
        let shift = shift(&predicted, &logits, &targets, &weights).unwrap().sum_all().unwrap();
        let shifted = (hard + shift).unwrap();
        let value = |t: &Tensor| t.to_scalar::<f32>().unwrap();
        assert!((value(&shifted) - value(&soft)).abs() < 1e-5);
        let gradient =
            |t: &Tensor| t.backward().unwrap().get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>();
        for (a, b) in gradient(&shifted).unwrap().iter().zip(gradient(&soft).unwrap()) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn relative_errors_do_not_depend_on_the_size() {
        let x = normal(&mut rng(), 1.0, (5, 3));
        let error = |x: &Tensor, y: &Tensor| relative_error(x, y).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(error(&x, &x), 0.0);
        for size in [1e-3, 1.0, 1e3] {
            let y = (&x * size).unwrap();
            assert!((error(&(&y * 1.5).unwrap(), &y) - 0.25).abs() < 1e-4);
        }
    }
}

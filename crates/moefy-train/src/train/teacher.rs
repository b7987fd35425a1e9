//! Distillation: what the dense model makes of a batch, and how far the trained one is from it.

use candle_core::Tensor;
use dynamoe_model::RoutedModel;

/// What the dense model makes of a batch, without gradient.
pub(super) struct TeacherOutputs {
    /// Probabilities of the next token, (N, V).
    pub(super) predicted: Tensor,
    /// Input of every layer's FFN, (N, D).
    pub(super) inputs: Vec<Tensor>,
    /// After the final norm, (N, D).
    pub(super) hidden: Tensor,
}

impl TeacherOutputs {
    pub(super) fn new(teacher: &RoutedModel, tokens: &Tensor) -> candle_core::Result<Self> {
        let mut inputs = Vec::new();
        let hidden = teacher.backbone().forward(tokens, &mut |layer, x| {
            inputs.push(x.detach());
            Ok(teacher.ffns()[layer].forward_routed(x, &[1.0])?.0)
        })?;
        // without gradient, so the fused operation may be used
        let predicted = candle_nn::ops::softmax_last_dim(&teacher.logits(&hidden)?)?.detach();
        Ok(Self { predicted, inputs, hidden: hidden.detach() })
    }

    /// Cross entropy under the dense model's predictions, less that under the `targets (N)`. Both have the same
    /// normaliser, so with `t` predicted and `y` the target, and `z` the logits, it is `z_y - Σ_v t_v z_v`.
    pub(super) fn shift(&self, logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        let target = logits.gather(&targets.unsqueeze(1)?, 1)?.mean_all()?;
        let predicted = (&self.predicted * logits)?.sum_all()? / targets.dim(0)? as f64;
        target - predicted?
    }
}

/// `Σ (x - y)² / Σ y²`, a scalar.
pub(super) fn relative_error(x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    (x - y)?.sqr()?.sum_all()? / y.sqr()?.sum_all()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use candle_nn::ops::{log_softmax, softmax};

    #[test]
    fn the_shift_turns_one_cross_entropy_into_the_other() {
        let random = |columns| Tensor::randn(0f32, 2.0, (6, columns), &Device::Cpu).unwrap();
        let (predicted, hidden) = (softmax(&random(11), 1).unwrap(), random(4));
        let logits = Var::from_tensor(&random(11)).unwrap();
        let targets = Tensor::new(&[0u32, 3, 10, 3, 7, 1], &Device::Cpu).unwrap();
        let log = log_softmax(logits.as_tensor(), 1).unwrap();
        let hard = log.gather(&targets.unsqueeze(1).unwrap(), 1).unwrap().mean_all().unwrap().neg().unwrap();
        let soft = (&predicted * &log).unwrap().sum(1).unwrap().mean_all().unwrap().neg().unwrap();
        let teacher = TeacherOutputs { predicted, inputs: Vec::new(), hidden };
        let shifted = (hard + teacher.shift(&logits, &targets).unwrap()).unwrap();
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
        let x = Tensor::randn(0f32, 1.0, (5, 3), &Device::Cpu).unwrap();
        let error = |x: &Tensor, y: &Tensor| relative_error(x, y).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(error(&x, &x), 0.0);
        for size in [1e-3, 1.0, 1e3] {
            let y = (&x * size).unwrap();
            assert!((error(&(&y * 1.5).unwrap(), &y) - 0.25).abs() < 1e-4);
        }
    }
}

//! Plain fine-tuning of the dense model: the baseline for quality.

use candle_core::{DType, Result, Tensor};
use rand_chacha::ChaCha8Rng;

use super::{Definition, LayerInput, Objective, Routed, Routing};
use crate::evaluate::curve::{Place, Probe};
use dynamoe::Dial;

pub(super) struct Dense;

impl Definition for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn label(&self) -> &'static str {
        "dense fine-tuned"
    }

    fn description(&self) -> &'static str {
        "Every token at full width, fine-tuned on the same tokens in the same order."
    }

    fn objective(&self, routing: &Routing) -> Box<dyn Objective> {
        Box::new(FullWidth { experts: routing.width_shares.len() })
    }

    fn places(&self, _: &Probe<'_>) -> Vec<Place> {
        vec![Place::Dial(Dial::Sensitivity(1.0))]
    }
}

struct FullWidth {
    experts: usize,
}

impl Objective for FullWidth {
    fn sample(&self, _: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        vec![1.0; sequences]
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let reach = Tensor::ones((input.x.dim(0)?, self.experts), DType::F32, input.x.device())?;
        Ok(Routed { reach, loss: None })
    }
}

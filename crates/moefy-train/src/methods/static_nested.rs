//! Static nesting (MatFormer): all tokens of a sequence share one width. The baseline for any router.

use candle_core::Result;
use dynamoe_model::ops::reach_of;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Definition, LayerInput, Objective, Routed, Routing, per_token};
use crate::evaluate::curve::{Place, Probe};
use dynamoe::Dial;

pub(super) struct StaticNested;

impl Definition for StaticNested {
    fn name(&self) -> &'static str {
        "static"
    }

    fn label(&self) -> &'static str {
        "static nested"
    }

    fn description(&self) -> &'static str {
        "One width for all tokens and layers, drawn at random for each training sequence (MatFormer)."
    }

    fn objective(&self, routing: &Routing) -> Box<dyn Objective> {
        Box::new(OneWidth { shares: routing.width_shares.clone() })
    }

    /// At the experts' own widths: a static model has no others.
    fn places(&self, probe: &Probe<'_>) -> Vec<Place> {
        probe.width_shares().into_iter().map(|share| Place::Dial(Dial::Sensitivity(share))).collect()
    }
}

/// The dial is the width, one of `shares`.
struct OneWidth {
    shares: Vec<f64>,
}

impl Objective for OneWidth {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| self.shares[rng.random_range(0..self.shares.len())]).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let expert = |width: f64| self.shares.partition_point(|&share| share < width);
        let chosen: Vec<usize> = per_token(input.dials, input.x.dim(0)?).map(expert).collect();
        Ok(Routed { reach: reach_of(&chosen, self.shares.len(), input.x.device())?, loss: None })
    }
}

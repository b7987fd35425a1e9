//! Random widths: every token of every layer draws its own. The baseline for a router that has learnt nothing.

use candle_core::Result;
use dynamoe_model::ops::reach_of;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Definition, LayerInput, Objective, Routed, Routing};
use crate::evaluate::curve::{Place, Probe};
use crate::random::{draw, widths_with_mean};

pub(super) struct RandomWidths;

impl Definition for RandomWidths {
    fn name(&self) -> &'static str {
        "random"
    }

    fn label(&self) -> &'static str {
        "random routing"
    }

    fn description(&self) -> &'static str {
        "Every token of every layer draws its width at random, in training and here."
    }

    fn objective(&self, routing: &Routing) -> Box<dyn Objective> {
        Box::new(Drawn { shares: routing.width_shares.clone() })
    }

    fn places(&self, probe: &Probe<'_>) -> Vec<Place> {
        let ends = [probe.width_shares()[0], 1.0];
        probe.widths_between().chain(ends).map(Place::Random).collect()
    }
}

/// The dial is the mean width.
struct Drawn {
    shares: Vec<f64>,
}

impl Objective for Drawn {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| rng.random_range(self.shares[0]..=1.0)).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let tokens = input.x.dim(0)?;
        let tables: Vec<Vec<f64>> = input.dials.iter().map(|&w| widths_with_mean(&self.shares, w)).collect();
        let positions = tokens / tables.len().max(1);
        let chosen: Vec<usize> = (0..tokens).map(|n| draw(&tables[n / positions], input.rng)).collect();
        Ok(Routed { reach: reach_of(&chosen, self.shares.len(), input.x.device())?, loss: None })
    }
}

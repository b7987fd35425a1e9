//! DynaMoE's default: the router learns from the language-model loss and from a price on width.
//!
//! Decisions are sampled: token `n` stops at expert `e` where `logit_e + noise ≥ logit(dial)`, logistic noise of spread
//! `noise`. The forward pass takes the sampled widths, the gradient that of their probabilities (straight-through). The
//! expected width is charged at the price that makes sequences as wide as they are meant to be ([`super::prices`]).

use anyhow::ensure;
use candle_core::{DType, Result, Tensor};
use candle_nn::ops::sigmoid;
use dynamoe::router::logit;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::prices::Prices;
use super::{Definition, LayerInput, Objective, Routed, Routing, draws, logits, per_token, routed_places};
use crate::evaluate::curve::{Place, Probe};

/// Keeps infinite thresholds, of the ends of the dial, finite: no logit reaches this.
const FAR: f32 = 60.0;

pub(super) struct Priced;

impl Definition for Priced {
    fn name(&self) -> &'static str {
        "priced"
    }

    fn label(&self) -> &'static str {
        "DynaMoE"
    }

    fn description(&self) -> &'static str {
        "A router trained through the loss, with a price on width."
    }

    fn has_router(&self) -> bool {
        true
    }

    fn rescales_dial(&self) -> bool {
        true
    }

    fn objective(&self, routing: &Routing) -> Box<dyn Objective> {
        Box::new(PricedWidth { prices: Prices::new(routing.sequences), routing: routing.clone() })
    }

    fn places(&self, probe: &Probe<'_>) -> Vec<Place> {
        routed_places(probe)
    }
}

/// The dial is the share of the way from the narrowest mean width to the full one.
struct PricedWidth {
    routing: Routing,
    prices: Prices,
}

impl Objective for PricedWidth {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| draws::near_focus(rng, &self.routing)).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let logits = logits(&input, "priced")?;
        let (tokens, smaller) = logits.dims2()?;
        let device = logits.device();
        let column = |values: Vec<f32>| Tensor::from_vec(values, (tokens, 1), device);
        let thresholds: Vec<f32> =
            per_token(input.dials, tokens).map(|d| logit(d).clamp(-FAR, FAR)).collect();
        let prices: Vec<f32> = per_token(&self.prices.at(input.dials), tokens).collect();
        let noise: Vec<f32> =
            (0..tokens * smaller).map(|_| logit(input.rng.random_range(1e-6..1.0 - 1e-6))).collect();
        let noise = Tensor::from_vec(noise, (tokens, smaller), device)?;

        let margin = logits.broadcast_sub(&column(thresholds)?)?; // (N, E-1)
        // probability of a wider expert than e
        let go_on = sigmoid(&(margin.neg()? / self.routing.temperature)?)?;
        let noise = (noise * self.routing.noise)?;
        let sampled = (margin.detach() + noise)?.lt(0f64)?.to_dtype(DType::F32)?;
        let (mut soft, mut hard) = (vec![Tensor::ones((tokens, 1), DType::F32, device)?], Vec::new());
        hard.push(soft[0].clone());
        for e in 0..smaller {
            soft.push((&soft[e] * go_on.narrow(1, e, 1)?)?);
            hard.push((&hard[e] * sampled.narrow(1, e, 1)?)?);
        }
        let (soft, hard) = (Tensor::cat(&soft, 1)?, Tensor::cat(&hard, 1)?); // (N, E)
        let reach = (hard + (&soft - soft.detach())?)?;

        let mut shells: Vec<f32> = self.routing.width_shares.iter().map(|&w| w as f32).collect();
        for e in (1..shells.len()).rev() {
            shells[e] -= shells[e - 1];
        }
        let shells = Tensor::from_vec(shells, (smaller + 1, 1), device)?;
        let loss = (soft.matmul(&shells)? * column(prices)?)?.mean_all()?;
        Ok(Routed { reach, loss: Some(loss) })
    }

    fn observe(&mut self, dials: &[f64], widths: &[f32]) {
        let narrowest = self.routing.width_shares[0];
        let found: Vec<f64> =
            widths.iter().map(|&w| (f64::from(w) - narrowest) / (1.0 - narrowest)).collect();
        self.prices.adapt(dials, &found);
    }

    fn state(&self) -> Vec<f32> {
        self.prices.log_ends.to_vec()
    }

    fn restore(&mut self, state: &[f32]) -> anyhow::Result<()> {
        let ends = <[f32; 2]>::try_from(state).ok().filter(|ends| ends.iter().all(|end| end.is_finite()));
        ensure!(ends.is_some(), "expected two finite log prices of width, found {state:?}");
        self.prices.log_ends = ends.unwrap_or_default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ffn, routing};
    use super::*;
    use crate::random::in_step;
    use crate::testing::{normal, rng, seed};
    use candle_core::Device;

    fn priced(shares: &[f64]) -> PricedWidth {
        let routing = routing(shares);
        PricedWidth { prices: Prices::new(routing.sequences), routing }
    }

    #[test]
    fn priced_routing_is_nested_and_its_ends_are_certain() {
        let mut rng = in_step(seed(), 0, 0);
        let n = 120;
        let priced = priced(&[0.25, 0.5, 1.0]);
        let (x, ffn) = (normal(&mut rng, 1.0, (n, 4)), ffn(&mut rng, 4, &[2, 4, 8]));
        let logits = normal(&mut rng, 3.0, (n, 2));
        let dials = &[0.0, 0.5, 1.0];
        let input = LayerInput { x: &x, logits: Some(&logits), ffn: &ffn, dials, rng: &mut rng };
        let routed = priced.route(input).unwrap();
        let reach = routed.reach.to_vec2::<f32>().unwrap();
        for (token, row) in reach.iter().enumerate() {
            assert_eq!(row[0], 1.0);
            assert!(row.windows(2).all(|pair| pair[0] >= pair[1] - 1e-6), "{row:?}");
            let sum: f32 = row.iter().sum();
            match token / 40 {
                0 => assert!((sum - 1.0).abs() < 1e-6, "{row:?}"),
                2 => assert!((sum - 3.0).abs() < 1e-6, "{row:?}"),
                _ => assert!((sum - sum.round()).abs() < 1e-5, "{row:?}"),
            }
        }
    }

    #[test]
    fn the_price_pushes_towards_narrow_experts() {
        let mut rng = rng();
        let priced = priced(&[0.25, 0.5, 1.0]);
        let (x, ffn) = (normal(&mut rng, 1.0, (8, 4)), ffn(&mut rng, 4, &[2, 4, 8]));
        let logits = candle_core::Var::zeros((8, 2), DType::F32, &Device::Cpu).unwrap();
        let input = LayerInput { x: &x, logits: Some(&logits), ffn: &ffn, dials: &[0.5], rng: &mut rng };
        let loss = priced.route(input).unwrap().loss.unwrap();
        let grad = loss.backward().unwrap().get(&logits).unwrap().to_vec2::<f32>().unwrap();
        assert!(grad.iter().flatten().all(|&g| g < 0.0), "a higher score must be cheaper: {grad:?}");
    }

    #[test]
    fn a_restored_objective_goes_on_where_it_was() {
        let (mut one, mut other) = (priced(&[0.25, 1.0]), priced(&[0.25, 1.0]));
        one.observe(&[0.5, 0.3], &[0.9, 0.4]);
        assert_ne!(one.state(), other.state());
        other.restore(&one.state()).unwrap();
        one.observe(&[0.5], &[0.1]);
        other.observe(&[0.5], &[0.1]);
        assert_eq!(one.state(), other.state());
        for broken in [&[1.0][..], &[1.0, f32::NAN]] {
            assert!(other.restore(broken).unwrap_err().to_string().contains("two finite log prices"));
        }
    }
}

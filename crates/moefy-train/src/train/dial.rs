//! The dial in training: how wide sequences are meant to be, and the price of width that makes them so.
//!
//! A sequence of the priced method draws a share `u` of the way from the narrowest mean width to the full one. Its price
//! is looked up here, and moved where the width that came out was another:
//!
//! ```text
//! ln price(u) = (1 - u) · t_0 + u · t_1        t_k += rate · Σ_sequences hat_k(u) · (found - u)
//! ```
//!
//! with `hat_0(u) = 1 - u`, `hat_1(u) = u`: dual ascent on "as low a loss as possible at mean width u". What the last
//! of a width is worth differs from model to model, and falls as narrow experts learn, so no option could say it.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::config::TrainConfig;
use dynamoe_model::Params;

/// Its name among what is trained, with which it is saved and restored.
const NAME: &str = "prices";
/// Prices at both ends to begin with, nats of a token's whole width.
const START: [f32; 2] = [5.0, 0.3];
/// Change of a log price over a whole training whose sequences are all wider by the whole range.
const TRAVEL: f32 = 60.0;
/// Largest change of a log price for one sequence: a short training must not throw it about.
const LARGEST_RATE: f32 = 0.1;

/// A dial from 0 to 1, uniform but for a share of sequences at each end.
pub fn even(rng: &mut ChaCha8Rng, config: &TrainConfig) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    if u < config.narrowest_share {
        0.0
    } else if u > 1.0 - config.full_share {
        1.0
    } else {
        v
    }
}

/// A share of the way from the `narrowest` width to the full one: [`even`], but crowded around `--focus`.
pub fn crowded(rng: &mut ChaCha8Rng, config: &TrainConfig, narrowest: f64) -> f64 {
    let narrowest = narrowest.min(1.0 - 1e-9);
    let focus = ((config.focus - narrowest) / (1.0 - narrowest)).clamp(0.0, 1.0);
    crowd(even(rng, config), focus, config.focus_power)
}

/// Moves `dial` towards `focus`, by its distance from there to the power of `power`; 0 and 1 stay.
fn crowd(dial: f64, focus: f64, power: f64) -> f64 {
    let end = if dial < focus { -focus } else { 1.0 - focus };
    if end == 0.0 { dial } else { focus + end * ((dial - focus) / end).powf(power) }
}

/// The log prices at both ends: (2).
pub struct Prices {
    state: Var,
    rate: f32,
}

impl Prices {
    /// For a training of this many sequences.
    ///
    /// # Errors
    /// candle's.
    pub fn new(params: &mut Params, sequences: u64) -> Result<Self> {
        let rate = (TRAVEL / sequences.max(1) as f32).min(LARGEST_RATE);
        let start = Tensor::new(&START.map(f32::ln), &Device::Cpu)?;
        Ok(Self { state: params.insert(NAME, &start)?, rate })
    }

    /// The price at each share, nats of a token's whole width.
    ///
    /// # Errors
    /// candle's.
    pub fn at(&self, shares: &[f64]) -> Result<Vec<f32>> {
        let ends = self.state.to_vec1::<f32>()?;
        Ok(shares.iter().map(|&u| ((1.0 - u as f32) * ends[0] + u as f32 * ends[1]).exp()).collect())
    }

    /// Moves the prices after sequences at `shares` came out as wide as `found`, also as shares of the way.
    ///
    /// # Errors
    /// candle's.
    pub fn adapt(&self, shares: &[f64], found: &[f64]) -> Result<()> {
        let mut ends = self.state.to_vec1::<f32>()?;
        // both ends of the dial are certain, whatever the price
        for (&u, &found) in shares.iter().zip(found).filter(|(u, _)| **u > 0.0 && **u < 1.0) {
            let change = self.rate * (found - u) as f32;
            ends[0] += change * (1.0 - u as f32);
            ends[1] += change * u as f32;
        }
        Ok(self.state.set(&Tensor::new(ends, self.state.device())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn dials_crowd_around_the_focus_and_reach_both_ends() {
        for focus in [0.0, 0.2, 0.5, 1.0] {
            let at = |dial| crowd(dial, focus, 2.0);
            assert_eq!([at(0.0), at(focus), at(1.0)], [0.0, focus, 1.0]);
            let steps: Vec<f64> = (0..=100).map(|k| at(f64::from(k) / 100.0)).collect();
            assert!(steps.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
            assert!((crowd(0.3, focus, 1.0) - 0.3).abs() < 1e-12);
        }
        // widths of .25 to 1 and a focus of .5: a third of the way
        let shares = TrainConfig { full_share: 0.2, narrowest_share: 0.1, ..TrainConfig::default() };
        let config = TrainConfig { focus: 0.5, focus_power: 2.0, ..shares };
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let dials: Vec<f64> = (0..20_000).map(|_| crowded(&mut rng, &config, 0.25)).collect();
        let share = |from: f64, to: f64| {
            dials.iter().filter(|dial| (from..=to).contains(*dial)).count() as f64 / dials.len() as f64
        };
        let sides = [share(1e-9, 1.0 / 3.0), share(1.0 / 3.0, 1.0 - 1e-9)];
        for (found, expected) in [share(0.0, 0.0), share(1.0, 1.0), sides[0], sides[1]].into_iter().zip([
            0.1,
            0.2,
            0.7 / 3.0,
            1.4 / 3.0,
        ]) {
            assert!((found - expected).abs() < 0.015, "{found} for {expected}");
        }
        // a quarter of the way from the focus to an end holds half of its side
        assert!((share(0.25, 0.5) - 0.35).abs() < 0.015);
    }

    #[test]
    fn prices_are_found_for_any_value_of_width() {
        // a width whose last bit is worth `top · exp(-steepness · u)` nats comes out where that equals the price
        for (top, steepness) in [(0.01f64, 3.0f64), (1.0, 1.0), (200.0, 5.0)] {
            let prices = Prices::new(&mut Params::new(), 6000).unwrap();
            let shares: Vec<f64> = (1..8).map(|k| f64::from(k) / 8.0).collect();
            let width = |price: &f32| ((top / f64::from(*price)).ln() / steepness).clamp(0.0, 1.0);
            let found = || prices.at(&shares).unwrap().iter().map(width).collect::<Vec<_>>();
            (0..6000 / 7).for_each(|_| prices.adapt(&shares, &found()).unwrap());
            for (u, found) in shares.iter().zip(found()) {
                assert!((u - found).abs() < 0.1, "{top} {steepness}: {u} {found}");
            }
        }
    }
}

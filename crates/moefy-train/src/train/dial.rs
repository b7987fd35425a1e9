//! Where the dial steers sequences while training, so that they are as wide as they are meant to be.
//!
//! A sequence draws a share `u` of the way from the narrowest mean width to the full one. What steers it there is
//! looked up here, and moved where the width that came out was another:
//!
//! ```text
//! value(u) = Σ_k hat_k(u) · t_k        t_k += rate · Σ_sequences hat_k(u) · (u - found)
//! ```
//!
//! For the gain router the value is the threshold on its logits, so the dial does not depend on where a model's
//! router puts its scores. For the priced router it is `-ln price`, and the rule is dual ascent on "as low a loss as
//! possible at mean width u": what the last of a width is worth differs from model to model, and falls as narrow
//! experts learn, so no option could say it.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use dynamoe::router::logit;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::config::TrainConfig;
use crate::model::Params;

/// Its name among what is trained, with which it is saved and restored.
const NAME: &str = "dial";
/// Knots of the thresholds: a router's scores may lie anywhere.
const THRESHOLDS: usize = 17;
/// Change of a threshold, in logits, for a sequence that is narrower by the whole range.
const THRESHOLD_RATE: f32 = 1.0;
/// Prices at both ends to begin with, nats of a token's whole width; between them they are geometric.
const PRICES: [f32; 2] = [5.0, 0.3];
/// Change of a log price over a whole training whose sequences are all wider by the whole range.
const PRICE_TRAVEL: f32 = 60.0;
/// Largest change of a log price for one sequence: a short training must not throw it about.
const PRICE_RATE: f32 = 0.1;
/// Share of a batch in the running scale.
const MIX: f32 = 0.1;

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

/// The values at knots evenly between both ends, and the running scale: `(knots + 1)`.
pub struct TrainingDial {
    state: Var,
    rate: f32,
}

impl TrainingDial {
    /// Thresholds on router logits, which start where the share is the sensitivity itself.
    ///
    /// # Errors
    /// candle's.
    pub fn of_thresholds(params: &mut Params) -> Result<Self> {
        let at = |k: usize| logit(k as f64 / (THRESHOLDS - 1) as f64).clamp(-4.0, 4.0);
        Self::new(params, (0..THRESHOLDS).map(at), THRESHOLD_RATE)
    }

    /// Prices of width, as `-ln price`, for a training of this many sequences.
    ///
    /// # Errors
    /// candle's.
    pub fn of_prices(params: &mut Params, sequences: u64) -> Result<Self> {
        let rate = (PRICE_TRAVEL / sequences.max(1) as f32).min(PRICE_RATE);
        Self::new(params, PRICES.into_iter().map(|price| -price.ln()), rate)
    }

    fn new(params: &mut Params, knots: impl Iterator<Item = f32>, rate: f32) -> Result<Self> {
        let state: Vec<f32> = knots.chain([0.0]).collect();
        Ok(Self { state: params.insert(NAME, &Tensor::new(state, &Device::Cpu)?)?, rate })
    }

    fn state(&self) -> Result<Vec<f32>> {
        Ok(self.state.to_vec1()?)
    }

    fn set(&self, state: Vec<f32>) -> Result<()> {
        Ok(self.state.set(&Tensor::new(state, self.state.device())?)?)
    }

    /// The threshold of each share; without bound at both ends.
    ///
    /// # Errors
    /// candle's.
    pub fn thresholds(&self, shares: &[f64]) -> Result<Vec<f32>> {
        let state = self.state()?;
        let at = |&u: &f64| match u {
            u if u <= 0.0 => f32::NEG_INFINITY,
            u if u >= 1.0 => f32::INFINITY,
            u => value(&state, u),
        };
        Ok(shares.iter().map(at).collect())
    }

    /// The price of each share, nats of a token's whole width.
    ///
    /// # Errors
    /// candle's.
    pub fn prices(&self, shares: &[f64]) -> Result<Vec<f32>> {
        let state = self.state()?;
        Ok(shares.iter().map(|&u| (-value(&state, u)).exp()).collect())
    }

    /// Moves the values after sequences at `shares` came out as wide as `found`, also as shares of the way.
    ///
    /// # Errors
    /// candle's.
    pub fn adapt(&self, shares: &[f64], found: &[f64]) -> Result<()> {
        let mut state = self.state()?;
        let knots = state.len() - 1;
        // both ends are certain, whatever steers
        for (&u, &found) in shares.iter().zip(found).filter(|(u, _)| **u > 0.0 && **u < 1.0) {
            for (k, share) in hats(u, knots) {
                state[k] += self.rate * share * (u - found) as f32;
            }
        }
        self.set(state)
    }

    /// The running mean of gains over their predictions, after a batch where it was `batch`: a router learns gains
    /// relative to each other, and the same options suit a model that needs its width and one that hardly does.
    ///
    /// # Errors
    /// candle's.
    pub fn scale(&self, batch: f64) -> Result<f64> {
        let mut state = self.state()?;
        let last = state.len() - 1;
        if batch > 0.0 && batch.is_finite() {
            let log = batch.ln() as f32;
            // the first batch counts whole
            state[last] = if state[last] == 0.0 { log } else { state[last] + MIX * (log - state[last]) };
            self.set(state.clone())?;
        }
        Ok(f64::from(state[last]).exp())
    }
}

/// The value at `u`.
fn value(state: &[f32], u: f64) -> f32 {
    hats(u, state.len() - 1).iter().map(|&(k, share)| share * state[k]).sum()
}

/// The two knots around `u` and their shares.
fn hats(u: f64, knots: usize) -> [(usize, f32); 2] {
    let at = u.clamp(0.0, 1.0) * (knots - 1) as f64;
    let below = (at as usize).min(knots - 2);
    let share = (at - below as f64) as f32;
    [(below, 1.0 - share), (below + 1, share)]
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
    fn thresholds_follow_the_width_and_the_ends_are_certain() {
        let dial = TrainingDial::of_thresholds(&mut Params::new()).unwrap();
        let shares = [0.0, 0.3, 0.5, 1.0];
        let before = dial.thresholds(&shares).unwrap();
        assert_eq!((before[0], before[3]), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(before[2].abs() < 1e-6 && before[1] < before[2]);
        dial.adapt(&shares, &shares).unwrap();
        assert_eq!(dial.thresholds(&shares).unwrap(), before);
        // too narrow at 0.3, too wide at 0.5
        dial.adapt(&shares, &[0.0, 0.1, 0.9, 1.0]).unwrap();
        let after = dial.thresholds(&shares).unwrap();
        assert!(after[1] > before[1] && after[2] < before[2]);
    }

    #[test]
    fn a_dial_finds_the_widths_of_any_router() {
        // logits spread evenly over 6 to 9, far from where the dial starts
        let dial = TrainingDial::of_thresholds(&mut Params::new()).unwrap();
        let shares: Vec<f64> = (1..16).map(|k| f64::from(k) / 16.0).collect();
        let width = |t: &f32| ((f64::from(*t) - 6.0) / 3.0).clamp(0.0, 1.0);
        let found = || dial.thresholds(&shares).unwrap().iter().map(width).collect::<Vec<_>>();
        let error = || shares.iter().zip(found()).map(|(u, f)| (u - f).abs()).fold(0.0, f64::max);
        assert!(error() > 0.9);
        (0..400).for_each(|_| dial.adapt(&shares, &found()).unwrap());
        assert!(error() < 0.02, "{}", error());
    }

    #[test]
    fn prices_are_found_for_any_value_of_width() {
        // a width whose last bit is worth `top · exp(-steepness · u)` nats comes out where that equals the price
        for (top, steepness) in [(0.01f64, 3.0f64), (1.0, 1.0), (200.0, 5.0)] {
            let dial = TrainingDial::of_prices(&mut Params::new(), 6000).unwrap();
            let shares: Vec<f64> = (1..8).map(|k| f64::from(k) / 8.0).collect();
            let width = |price: &f32| ((top / f64::from(*price)).ln() / steepness).clamp(0.0, 1.0);
            let found = || dial.prices(&shares).unwrap().iter().map(width).collect::<Vec<_>>();
            (0..6000 / 7).for_each(|_| dial.adapt(&shares, &found()).unwrap());
            for (u, found) in shares.iter().zip(found()) {
                assert!((u - found).abs() < 0.1, "{top} {steepness}: {u} {found}");
            }
        }
    }

    #[test]
    fn the_scale_follows_slowly() {
        let dial = TrainingDial::of_thresholds(&mut Params::new()).unwrap();
        assert!((dial.scale(0.01).unwrap() - 0.01).abs() < 1e-6);
        let next = dial.scale(0.02).unwrap();
        assert!(next > 0.01 && next < 0.012);
        assert!((dial.scale(-1.0).unwrap() - next).abs() < 1e-9);
    }
}

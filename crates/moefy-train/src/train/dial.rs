//! Where the dial's thresholds lie while training, so that sequences are as wide as they are meant to be.
//!
//! A sequence draws a share `u` of the way from the narrowest mean width to the full one. The threshold on its
//! router logits is looked up here, and moved where the width that came out was another:
//!
//! ```text
//! threshold(u) = Σ_k hat_k(u) · t_k        t_k += rate · Σ_sequences hat_k(u) · (u - found)
//! ```
//!
//! So the dial does not depend on where a model's router puts its scores. `scale` is the running mean of gains over
//! their predictions: a router learns gains relative to each other, and the same options suit a model that needs
//! its width and one that hardly does.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use dynamoe::router::logit;

use crate::model::Params;

/// Its name among what is trained, with which it is saved and restored.
const NAME: &str = "dial";
/// Shares of the way whose threshold is kept; between them it is linear.
const KNOTS: usize = 17;
/// Change of a threshold, in logits, for a sequence that is narrower by the whole range.
const RATE: f32 = 1.0;
/// Share of a batch in the running scale.
const MIX: f32 = 0.1;

/// Thresholds and scale: `(KNOTS + 1)`.
pub struct TrainingDial(Var);

impl TrainingDial {
    /// Starts where the share is the sensitivity itself.
    ///
    /// # Errors
    /// candle's.
    pub fn new(params: &mut Params) -> Result<Self> {
        let at = |k: usize| logit(k as f64 / (KNOTS - 1) as f64).clamp(-4.0, 4.0);
        let state: Vec<f32> = (0..KNOTS).map(at).chain([0.0]).collect();
        Ok(Self(params.insert(NAME, &Tensor::new(state, &Device::Cpu)?)?))
    }

    fn state(&self) -> Result<Vec<f32>> {
        Ok(self.0.to_vec1()?)
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
            u => hats(u).iter().map(|&(k, share)| share * state[k]).sum(),
        };
        Ok(shares.iter().map(at).collect())
    }

    /// Moves the thresholds after sequences at `shares` came out as wide as `found`, also as shares of the way.
    ///
    /// # Errors
    /// candle's.
    pub fn adapt(&self, shares: &[f64], found: &[f64]) -> Result<()> {
        let mut state = self.state()?;
        // both ends are certain, whatever the threshold
        for (&u, &found) in shares.iter().zip(found).filter(|(u, _)| **u > 0.0 && **u < 1.0) {
            for (k, share) in hats(u) {
                state[k] += RATE * share * (u - found) as f32;
            }
        }
        Ok(self.0.set(&Tensor::new(state, self.0.device())?)?)
    }

    /// The running scale after a batch whose gains were `batch` times their predictions.
    ///
    /// # Errors
    /// candle's.
    pub fn scale(&self, batch: f64) -> Result<f64> {
        let mut state = self.state()?;
        if batch > 0.0 && batch.is_finite() {
            let log = batch.ln() as f32;
            // the first batch counts whole
            state[KNOTS] = if state[KNOTS] == 0.0 { log } else { state[KNOTS] + MIX * (log - state[KNOTS]) };
            self.0.set(&Tensor::new(state.clone(), self.0.device())?)?;
        }
        Ok(f64::from(state[KNOTS]).exp())
    }
}

/// The two knots around `u` and their shares.
fn hats(u: f64) -> [(usize, f32); 2] {
    let at = u.clamp(0.0, 1.0) * (KNOTS - 1) as f64;
    let below = (at as usize).min(KNOTS - 2);
    let share = (at - below as f64) as f32;
    [(below, 1.0 - share), (below + 1, share)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_follow_the_width_and_the_ends_are_certain() {
        let dial = TrainingDial::new(&mut Params::new()).unwrap();
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
        let dial = TrainingDial::new(&mut Params::new()).unwrap();
        let shares: Vec<f64> = (1..16).map(|k| f64::from(k) / 16.0).collect();
        let width = |t: &f32| ((f64::from(*t) - 6.0) / 3.0).clamp(0.0, 1.0);
        let found = || dial.thresholds(&shares).unwrap().iter().map(width).collect::<Vec<_>>();
        let error = || shares.iter().zip(found()).map(|(u, f)| (u - f).abs()).fold(0.0, f64::max);
        assert!(error() > 0.9);
        (0..400).for_each(|_| dial.adapt(&shares, &found()).unwrap());
        assert!(error() < 0.02, "{}", error());
    }

    #[test]
    fn the_scale_follows_slowly() {
        let dial = TrainingDial::new(&mut Params::new()).unwrap();
        assert!((dial.scale(0.01).unwrap() - 0.01).abs() < 1e-6);
        let next = dial.scale(0.02).unwrap();
        assert!(next > 0.01 && next < 0.012);
        assert!((dial.scale(-1.0).unwrap() - next).abs() < 1e-9);
    }
}

//! The price of width that makes training sequences as wide as they are meant to be.
//!
//! A sequence of the priced method draws a share `u` of the way from the narrowest mean width to the full one. Its price is
//! looked up here, and moved where the sequence came out wider or narrower:
//!
//! ```text
//! ln price(u) = (1 - u) · t_0 + u · t_1        t_k += rate · Σ_sequences hat_k(u) · (found - u)
//! ```
//!
//! with `hat_0(u) = 1 - u`, `hat_1(u) = u`: dual ascent on "as low a loss as possible at mean width u". How much the last
//! bit of width is worth depends on the model and shrinks during training, so a fixed price cannot be right.

/// Prices at both ends to begin with, nats of a token's whole width.
const START: [f32; 2] = [5.0, 0.3];
/// Total change of a log price if every sequence of the training overshoots by the full range.
const TRAVEL: f32 = 60.0;
/// Largest change of a log price for one sequence: a short training must not throw it about.
const LARGEST_RATE: f32 = 0.1;

/// The price of width along the dial.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prices {
    /// `t_0` and `t_1`.
    pub(super) log_ends: [f32; 2],
    rate: f32,
}

impl Prices {
    /// For a training of this many sequences.
    pub(super) fn new(sequences: u64) -> Self {
        let rate = (TRAVEL / sequences.max(1) as f32).min(LARGEST_RATE);
        Self { log_ends: START.map(f32::ln), rate }
    }

    /// The price at each share, nats of a token's whole width.
    pub(super) fn at(&self, shares: &[f64]) -> Vec<f32> {
        let ends = self.log_ends;
        shares.iter().map(|&u| ((1.0 - u as f32) * ends[0] + u as f32 * ends[1]).exp()).collect()
    }

    /// Moves the prices after sequences at `shares` came out as wide as `found`, also as shares of the way.
    pub(super) fn adapt(&mut self, shares: &[f64], found: &[f64]) {
        let ends = &mut self.log_ends;
        // both ends of the dial are certain, whatever the price
        for (&u, &found) in shares.iter().zip(found).filter(|(u, _)| **u > 0.0 && **u < 1.0) {
            let change = self.rate * (found - u) as f32;
            ends[0] += change * (1.0 - u as f32);
            ends[1] += change * u as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_found_for_any_value_of_width() {
        // a width whose last bit is worth `top · exp(-steepness · u)` nats comes out where that equals the price
        for (top, steepness) in [(0.01f64, 3.0f64), (1.0, 1.0), (200.0, 5.0)] {
            let mut prices = Prices::new(6000);
            let shares: Vec<f64> = (1..8).map(|k| f64::from(k) / 8.0).collect();
            let width = |price: &f32| ((top / f64::from(*price)).ln() / steepness).clamp(0.0, 1.0);
            let found = |prices: &Prices| prices.at(&shares).iter().map(width).collect::<Vec<_>>();
            for _ in 0..6000 / 7 {
                prices.adapt(&shares, &found(&prices.clone()));
            }
            for (u, found) in shares.iter().zip(found(&prices)) {
                assert!((u - found).abs() < 0.1, "{top} {steepness}: {u} {found}");
            }
        }
    }
}

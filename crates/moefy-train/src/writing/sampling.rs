//! Drawing the next token.

use anyhow::{Context, Result, ensure};
use rand::Rng;

/// The share of the probability that tokens are drawn from: see [`super`].
pub(super) const NUCLEUS: f64 = 0.95;

/// Draws a token `v` with a probability that is proportional to `softmax(logits)_v`, from the fewest tokens that together
/// have at least `nucleus` of the probability of those that are allowed (nucleus or top-p sampling, arXiv 1904.09751).
///
/// # Errors
/// Logits that are not finite, or none that is allowed.
pub(super) fn draw(
    logits: &[f32],
    nucleus: f64,
    allowed: impl Fn(u32) -> bool,
    rng: &mut impl Rng,
) -> Result<u32> {
    let choices = || (0u32..).zip(logits).filter(|(token, _)| allowed(*token));
    let largest = choices().map(|(_, &logit)| logit).fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(u32, f32)> =
        choices().map(|(token, logit)| (token, (logit - largest).exp())).collect();
    let sum_of = |weights: &[(u32, f32)]| weights.iter().map(|&(_, weight)| f64::from(weight)).sum::<f64>();
    let sum = sum_of(&weights);
    ensure!(sum.is_finite() && sum > 0.0, "the model's predictions are not finite numbers");
    // all tokens below this share together have less than what is left out, so that only the others need to be sorted
    let least = (1.0 - nucleus) * sum / weights.len() as f64;
    weights.retain(|&(_, weight)| weight > 0.0 && f64::from(weight) >= least);
    weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut seen = 0.0;
    let taken = weights.iter().take_while(|&&(_, weight)| {
        let before = seen;
        seen += f64::from(weight);
        before < nucleus * sum
    });
    weights.truncate(taken.count());
    let mut rest = rng.random::<f64>() * sum_of(&weights);
    let drawn = weights.iter().find(|&&(_, weight)| {
        rest -= f64::from(weight);
        rest < 0.0
    });
    // sums are rounded, so something may be left after the last one
    Ok(drawn.or(weights.last()).context("a positive sum has a positive part")?.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::rng;

    /// Shares of 30,000 draws.
    fn shares<const N: usize>(p: [f32; N], nucleus: f64) -> [f32; N] {
        let logits = p.map(|p| p.ln() + 7.0);
        let (mut rng, mut counts) = (rng(), [0u32; N]);
        (0..30_000).for_each(|_| counts[draw(&logits, nucleus, |_| true, &mut rng).unwrap() as usize] += 1);
        counts.map(|count| count as f32 / 30_000.0)
    }

    #[test]
    fn tokens_come_as_often_as_the_model_says() {
        let p = [0.1, 0.0, 0.4, 0.3, 0.2];
        for (nucleus, expected) in [
            (1.0, p),
            (0.95, p),
            (0.89, [0.0, 0.0, 4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0]),
            (0.5, [0.0, 0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0]),
            (0.3, [0.0, 0.0, 1.0, 0.0, 0.0]),
        ] {
            let found = shares(p, nucleus);
            for (found, expected) in found.iter().zip(expected) {
                // five standard deviations of a share of 30,000 draws: at most 5 * sqrt(.25 / 30000) = .014
                assert!((found - expected).abs() < 0.014, "{nucleus}: {found:?}");
            }
            assert!(found.iter().zip(expected).all(|(found, expected)| expected > 0.0 || *found == 0.0));
        }
    }

    #[test]
    fn what_is_not_allowed_never_comes() {
        let mut rng = rng();
        let mut draw = |logits: &[f32], allowed: fn(u32) -> bool| draw(logits, 0.95, allowed, &mut rng);
        for _ in 0..1000 {
            assert_eq!(draw(&[50.0, 1.0, 60.0], |token| token == 1).unwrap(), 1);
        }
        for logits in [&[f32::NAN, 1.0][..], &[f32::INFINITY, 1.0], &[f32::NEG_INFINITY; 2], &[]] {
            assert!(draw(logits, |_| true).is_err(), "{logits:?}");
        }
    }
}

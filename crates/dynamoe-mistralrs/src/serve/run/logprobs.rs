//! Log probabilities: natural logarithms of the model's own distribution, whatever the sampling.

/// How likely a token was.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprob {
    /// Of `token` in the distribution of `scores`, with the `top` likeliest.
    pub fn of(scores: &[f32], token: u32, top: usize) -> Self {
        let normalizer = normalizer(scores);
        let logprob = |score: f32| finite(f64::from(score) - normalizer);
        let of_token = scores.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let top = likeliest(scores, top).into_iter().map(|(id, score)| (id, logprob(score))).collect();
        Self { token, logprob: logprob(of_token), top }
    }
}

/// JSON has no infinity.
fn finite(logprob: f64) -> f32 {
    (logprob as f32).max(-9999.0)
}

/// The logarithm of the sum of exponentials.
fn normalizer(scores: &[f32]) -> f64 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|&score| f64::from(score - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

/// The `count` largest scores, largest first; of equal ones the first.
pub(super) fn likeliest(scores: &[f32], count: usize) -> Vec<(u32, f32)> {
    if count == 0 {
        return Vec::new();
    }
    let mut all: Vec<(u32, f32)> = (0..).zip(scores.iter().copied()).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_natural_logarithms() {
        // probabilities 1/8, 5/8, 2/8
        let scores = [1.0f32.ln() + 3.0, 5.0f32.ln() + 3.0, 2.0f32.ln() + 3.0];
        let told = TokenLogprob::of(&scores, 2, 2);
        assert!((told.logprob - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(told.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 2]);
        assert!((told.top[0].1 - 0.625f32.ln()).abs() < 1e-6);
        assert_eq!(told.top[1].1, told.logprob);
        assert!(TokenLogprob::of(&scores, 0, 0).top.is_empty());
        assert_eq!(TokenLogprob::of(&scores, 0, 9).top.len(), 3);
    }

    #[test]
    fn what_cannot_be_is_still_a_number() {
        let told = TokenLogprob::of(&[0.0, f32::NEG_INFINITY], 1, 2);
        assert_eq!((told.logprob, told.top[1]), (-9999.0, (1, -9999.0)));
        assert_eq!(TokenLogprob::of(&[0.0], 7, 0).logprob, -9999.0);
    }

    #[test]
    fn of_equal_ones_the_first_is_likeliest() {
        assert_eq!(likeliest(&[1.0, 2.0, 2.0, 0.0], 2), [(1, 2.0), (2, 2.0)]);
        assert_eq!(likeliest(&[1.0], 0), []);
    }
}

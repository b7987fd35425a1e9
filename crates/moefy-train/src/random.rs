//! Every random stream of a training, in one place. A stream depends on nothing but its arguments, so a resumed run needs
//! no generator's state. Streams of different purposes never meet: their keys differ in the last word.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The last word of a key: what the stream is for.
mod purpose {
    pub const ORDER: u64 = 0;
    pub const TEXT: u64 = 1;
    pub const STEP: u64 = 0x6479_6e61_6d6f_6521;
}

fn stream(key: [u64; 4]) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(key) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

/// The order of training chunks: `part` numbers what is shuffled, `round` how often it was shuffled before.
pub fn data_order(seed: u64, part: u64, round: u64) -> ChaCha8Rng {
    stream([seed, part, round, purpose::ORDER])
}

/// The words of document `document` of a text that a model writes.
pub fn document(seed: u64, document: u64) -> ChaCha8Rng {
    stream([seed, document, 0, purpose::TEXT])
}

/// Draws within step (or batch) `step`; `part` tells the draws of one step apart.
pub fn in_step(seed: u64, step: u64, part: u64) -> ChaCha8Rng {
    stream([seed, step, part, purpose::STEP])
}

/// The first weights of a layer's router. They do not depend on how many layers came before.
pub fn router(seed: u64, layer: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(layer as u64);
    rng
}

/// Probabilities of the experts whose mean width is `mean`, as even as that allows (`∝ exp(β·width)`).
pub fn widths_with_mean(shares: &[f64], mean: f64) -> Vec<f64> {
    let at = |beta: f64| {
        let weights: Vec<f64> = shares.iter().map(|w| (beta * (w - 0.5)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect::<Vec<f64>>()
    };
    let (mut low, mut high) = (-400.0, 400.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let found: f64 = at(middle).iter().zip(shares).map(|(p, w)| p * w).sum();
        if found < mean { low = middle } else { high = middle }
    }
    at(0.5 * (low + high))
}

/// An index drawn with these probabilities.
pub fn draw(probabilities: &[f64], rng: &mut impl Rng) -> usize {
    let mut u: f64 = rng.random();
    for (index, p) in probabilities.iter().enumerate() {
        u -= p;
        if u < 0.0 {
            return index;
        }
    }
    probabilities.len() - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_different_purposes_or_arguments_differ() {
        let first = |mut rng: ChaCha8Rng| rng.random::<u64>();
        let mut found: Vec<u64> = Vec::new();
        for (a, b, c) in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            found.extend([first(data_order(a, b, c)), first(in_step(a, b, c))]);
        }
        found.extend([first(document(0, 0)), first(document(1, 0)), first(document(0, 1))]);
        let count = found.len();
        found.sort();
        found.dedup();
        assert_eq!(found.len(), count);
        assert_eq!(first(in_step(7, 8, 9)), first(in_step(7, 8, 9)));
        assert_ne!(first(router(7, 0)), first(router(7, 1)));
    }

    #[test]
    fn random_widths_have_the_mean_asked_for() {
        let shares = [0.25, 0.5, 0.75, 1.0];
        for mean in [0.25, 0.3, 0.5, 0.625, 0.9, 1.0] {
            let p = widths_with_mean(&shares, mean);
            let found: f64 = p.iter().zip(shares).map(|(p, w)| p * w).sum();
            assert!((found - mean).abs() < 1e-3, "{mean}: {found}");
        }
        let even = widths_with_mean(&shares, 0.625);
        assert!(even.iter().all(|p| (p - 0.25).abs() < 1e-6));
    }

    #[test]
    fn draws_follow_their_probabilities() {
        let mut rng = in_step(1, 0, 0);
        let mut counts = [0; 3];
        (0..30_000).for_each(|_| counts[draw(&[0.2, 0.5, 0.3], &mut rng)] += 1);
        for (count, p) in counts.iter().zip([0.2, 0.5, 0.3]) {
            // five standard deviations of a share of 30,000 draws: at most 5 * sqrt(.25 / 30000) = .014
            assert!((f64::from(*count) / 30_000.0 - p).abs() < 0.014);
        }
    }
}

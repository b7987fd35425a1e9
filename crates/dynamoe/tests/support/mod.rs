//! Random numbers for tests; the unit tests of the crate use this file too.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A generator with a fresh seed, which a failing test shows. `TEST_SEED=…` repeats a run.
pub fn rng() -> ChaCha8Rng {
    let seed = match std::env::var("TEST_SEED") {
        Ok(seed) => seed.parse().expect("TEST_SEED must be a whole number"),
        Err(_) => rand::random(),
    };
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

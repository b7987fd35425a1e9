//! Random numbers for tests; the unit tests of the crate use this file too.
#![allow(dead_code)] // each test program uses a part

use candle_core::{Device, Shape, Tensor};
use rand::{Rng, SeedableRng};
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

/// Random numbers from `-bound` to `bound`.
pub fn uniform(rng: &mut ChaCha8Rng, bound: f32, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random_range(-bound..bound)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

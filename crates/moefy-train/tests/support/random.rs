//! Random numbers for tests; the unit tests of the crate use this file too.
#![allow(dead_code)] // each test program uses a part

use candle_core::{Device, Shape, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A fresh seed, which a failing test shows. `TEST_SEED=…` repeats a run.
pub fn seed() -> u64 {
    let seed = match std::env::var("TEST_SEED") {
        Ok(seed) => seed.parse().expect("TEST_SEED must be a whole number"),
        Err(_) => rand::random(),
    };
    println!("seed {seed}");
    seed
}

/// A generator with such a seed.
pub fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed())
}

/// Normally distributed numbers around 0.
pub fn normal(rng: &mut ChaCha8Rng, deviation: f32, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = StandardNormal.sample_iter(rng).take(shape.elem_count()).collect();
    (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * f64::from(deviation)).unwrap()
}

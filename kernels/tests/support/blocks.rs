//! Matrices in GGUF's blocks.

use dynamoe_kernels::plan::Block;
use dynamoe_kernels::reference;
use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

use super::Memory;

/// A matrix of random blocks: their bytes, and the weights that they stand for.
pub struct Blocks {
    pub memory: Memory,
    pub weights: Vec<f64>,
}

impl Blocks {
    /// Scales are whole multiples of 2⁻²⁰, so that a weight is exact in f32 in whatever order it is computed.
    pub fn random(rng: &mut ChaCha8Rng, block: Block, [rows, columns]: [usize; 2]) -> Self {
        let mut bytes = vec![0; rows * columns / block.weights() * block.bytes()];
        rng.fill_bytes(&mut bytes);
        for block_bytes in bytes.chunks_mut(block.bytes()) {
            let mut scale = |at: usize, largest: i32| {
                let value = f64::from(rng.random_range(-largest..=largest)) / f64::from(1 << 20);
                block_bytes[at..at + 2].copy_from_slice(&half::f16::from_f64(value).to_le_bytes());
            };
            match block {
                Block::Q4K => (scale(0, 1000), scale(2, 2000)),
                Block::Q8_0 => (scale(0, 2000), ()),
            };
        }
        let weights = reference::dequantize(block, &bytes);
        assert_eq!(weights.len(), rows * columns);
        Self { memory: Memory::of(&bytes), weights }
    }
}

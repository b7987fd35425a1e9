//! Matrices in GGUF's blocks.

use dynamoe_kernels::args::{Segment, Serves};
use dynamoe_kernels::plan::{Block, Float};
use dynamoe_kernels::reference;
use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

use super::layer::Matrices;
use super::{Memory, Strided, round};

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

    fn poison(&mut self) {
        self.memory = Memory::poisoned(self.memory.read::<u8>().len());
    }
}

/// Shells of an FFN: gate, up and down matrix of each.
pub struct Shells {
    block: [Block; 2],
    d: usize,
    ends: Vec<usize>,
    shells: Vec<[Blocks; 3]>,
}

impl Shells {
    pub fn random(rng: &mut ChaCha8Rng, block: [Block; 2], d: usize, ends: &[usize]) -> Self {
        let mut start = 0;
        let shells = ends.iter().map(|&end| {
            let neurons = end - std::mem::replace(&mut start, end);
            let mut matrix = |block, shape| Blocks::random(rng, block, shape);
            [matrix(block[0], [neurons, d]), matrix(block[0], [neurons, d]), matrix(block[1], [d, neurons])]
        });
        Self { shells: shells.collect(), block, d, ends: ends.to_vec() }
    }

    pub fn neurons(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn segments(&self) -> Vec<Segment> {
        let mut start = 0;
        let segment = |(&end, [gate, up, down]): (&usize, &[Blocks; 3])| {
            let start = std::mem::replace(&mut start, end);
            let [across, along] = [(self.block[0], self.d), (self.block[1], end - start)]
                .map(|(b, n)| (n / b.weights()) as u32);
            Segment {
                gate: gate.memory.address(),
                up: up.memory.address(),
                down: down.memory.address(),
                start: start as u32,
                end: end as u32,
                gate_stride: across,
                up_stride: across,
                down_stride: along,
                serves: Serves::AllTokens,
            }
        };
        self.ends.iter().zip(&self.shells).map(segment).collect()
    }

    /// Makes the shells NaN that no token needs, of a layer's dense and separate ones; experts are as many as dense shells.
    pub fn poison_unneeded([dense, separate]: [&mut Self; 2], experts: &[u32]) {
        let largest = dense.shells.len() - 1;
        let reach = |full: bool| {
            let experts = experts.iter().map(|&e| e as usize).filter(|&e| (e == largest) == full);
            experts.map(|e| e + 1).max().unwrap_or(0)
        };
        let (full, below) = (reach(true), reach(false));
        for (s, shell) in dense.shells.iter_mut().enumerate() {
            let needed = if s < separate.shells.len() { full } else { full.max(below) };
            shell.iter_mut().filter(|_| s >= needed).for_each(Blocks::poison);
        }
        separate.shells.iter_mut().skip(below).flatten().for_each(Blocks::poison);
    }

    /// The weights as whole matrices, rounded as the kernels unpack them. They are not in memory.
    pub fn matrices(&self, float: Float) -> Matrices {
        let (d, neurons) = (self.d, self.neurons());
        let strided = |values: Vec<f64>, stride| {
            let values = values.into_iter().map(|w| round(float, w)).collect();
            Strided { values, stride, memory: Memory::of::<u8>(&[]) }
        };
        let stack = |m: usize| strided(self.shells.iter().flat_map(|s| s[m].weights.clone()).collect(), d);
        let row = |r: usize| {
            self.shells.iter().flat_map(move |s| {
                let columns = s[2].weights.len() / d;
                s[2].weights[r * columns..][..columns].to_vec()
            })
        };
        let down = strided((0..d).flat_map(row).collect(), neurons);
        Matrices { gate: stack(0), up: stack(1), down, neurons }
    }
}

//! Poisoned memory, random layers and the simulation, for tests of kernels.
#![allow(dead_code)] // each test uses its part

pub mod blocks;
pub mod case;
pub mod layer;

use dynamoe_kernels::args::{Address, Segment};
use dynamoe_kernels::plan::{Float, Launch};
use dynamoe_kernels::reference::Matrix;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

/// A generator with a fresh seed, which a failing test shows. `TEST_SEED=…` repeats a run.
pub fn rng() -> ChaCha8Rng {
    let seed = match std::env::var("TEST_SEED") {
        Ok(seed) => seed.parse().expect("TEST_SEED must be a whole number"),
        Err(_) => rand::random(),
    };
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Memory at a multiple of 16 bytes, full of NaN, with a margin on both sides that no kernel may touch.
pub struct Memory {
    words: Vec<u128>,
    bytes: usize,
}

const MARGIN: usize = 16;
const POISON: u128 = u128::MAX;

impl Memory {
    pub fn poisoned(bytes: usize) -> Self {
        Self { words: vec![POISON; bytes.div_ceil(16) + 2 * MARGIN], bytes }
    }

    pub fn of<T: Copy>(values: &[T]) -> Self {
        let mut memory = Self::poisoned(size_of_val(values));
        // SAFETY: as many bytes as the values have; both are plain data
        unsafe { memory.words.as_mut_ptr().add(MARGIN).cast::<T>().copy_from(values.as_ptr(), values.len()) };
        memory
    }

    pub fn address(&self) -> Address {
        self.words.as_ptr() as Address + 16 * MARGIN as Address
    }

    /// The content, which must be plain numbers.
    pub fn read<T: Copy>(&self) -> Vec<T> {
        let inside = self.words.len() - MARGIN;
        assert!(
            self.words[..MARGIN].iter().chain(&self.words[inside..]).all(|&w| w == POISON),
            "margin written"
        );
        // SAFETY: the memory holds that many values of plain data
        unsafe { std::slice::from_raw_parts(self.address() as *const T, self.bytes / size_of::<T>()) }
            .to_vec()
    }
}

pub fn round(float: Float, x: f64) -> f64 {
    match float {
        Float::F32 => f64::from(x as f32),
        Float::F16 => half::f16::from_f64(x).to_f64(),
        Float::Bf16 => half::bf16::from_f64(x).to_f64(),
    }
}

/// Largest relative error of storing a number.
pub fn epsilon(float: Float) -> f64 {
    match float {
        Float::F32 => 6e-8,
        Float::F16 => 4.9e-4,
        Float::Bf16 => 3.9e-3,
    }
}

pub fn encode(float: Float, values: &[f64]) -> Memory {
    match float {
        Float::F32 => Memory::of(&values.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        Float::F16 => Memory::of(&values.iter().map(|&x| half::f16::from_f64(x)).collect::<Vec<_>>()),
        Float::Bf16 => Memory::of(&values.iter().map(|&x| half::bf16::from_f64(x)).collect::<Vec<_>>()),
    }
}

pub fn decode(float: Float, memory: &Memory) -> Vec<f64> {
    match float {
        Float::F32 => memory.read::<f32>().into_iter().map(f64::from).collect(),
        Float::F16 => memory.read::<half::f16>().into_iter().map(half::f16::to_f64).collect(),
        Float::Bf16 => memory.read::<half::bf16>().into_iter().map(half::bf16::to_f64).collect(),
    }
}

/// A random matrix whose rows are apart by more than their length; what lies between is NaN.
pub struct Strided {
    pub values: Vec<f64>,
    pub stride: usize,
    pub memory: Memory,
}

impl Strided {
    pub fn random(rng: &mut ChaCha8Rng, float: Float, shape: [usize; 2], scale: f64) -> Self {
        let [rows, columns] = shape;
        let stride = columns + 8 * rng.random_range(0..3);
        let value = |at: usize, rng: &mut ChaCha8Rng| {
            if at % stride < columns { round(float, rng.random_range(-scale..scale)) } else { f64::NAN }
        };
        let values: Vec<f64> = (0..rows * stride).map(|at| value(at, rng)).collect();
        Self { memory: encode(float, &values), values, stride }
    }

    pub fn view(&self) -> Matrix<'_> {
        Matrix { data: &self.values, stride: self.stride }
    }

    /// The columns `range` as a matrix of their own.
    pub fn columns(&self, float: Float, range: std::ops::Range<usize>) -> Memory {
        let rows = self.values.chunks(self.stride);
        encode(float, &rows.flat_map(|row| row[range.clone()].to_vec()).collect::<Vec<_>>())
    }
}

pub fn floats(rng: &mut ChaCha8Rng, count: usize, scale: f64) -> Vec<f64> {
    (0..count).map(|_| round(Float::F32, rng.random_range(-scale..scale))).collect()
}

/// Where the experts of the tokens lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// All on the smallest.
    Narrow,
    /// All on the largest.
    Wide,
    /// Anywhere.
    Mixed,
    /// Anywhere but on the largest.
    Below,
    /// One on the largest.
    OneWide,
}

pub const MIXES: [Mix; 3] = [Mix::Narrow, Mix::Wide, Mix::Mixed];
pub const SEPARATE_MIXES: [Mix; 4] = [Mix::Wide, Mix::Mixed, Mix::Below, Mix::OneWide];

pub fn experts(rng: &mut ChaCha8Rng, mix: Mix, tokens: usize, count: usize) -> Vec<u32> {
    let largest = count as u32 - 1;
    let wide = rng.random_range(0..tokens.max(1));
    let one = |token| match mix {
        Mix::Narrow => 0,
        Mix::Wide => largest,
        Mix::OneWide if token == wide => largest,
        Mix::Below | Mix::OneWide if largest > 0 => rng.random_range(0..largest),
        _ => rng.random_range(0..=largest),
    };
    (0..tokens).map(one).collect()
}

/// Lengths of segments, for plans.
pub fn lengths(segments: &[Segment]) -> Vec<usize> {
    segments.iter().map(|s| (s.end - s.start) as usize).collect()
}

/// Runs a planned launch with a seeded order; returns the barriers met.
pub fn run_without<A>(
    launch: &Launch,
    args: &A,
    seed: u64,
    without_barrier: Option<u32>,
) -> Result<u32, String> {
    let simulated = dynamoe_kernels_sim::Launch {
        kernel: &launch.kernel,
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: launch.shared_bytes,
        seed,
        without_barrier,
    };
    // SAFETY: the tests build arguments from memory that lives through the call
    unsafe { simulated.run(args) }.map_err(|fault| fault.to_string())
}

/// Leaves out each barrier in turn, in the order of each of `seeds`. Says of each barrier whether `attempt` has failed
/// without it. With all barriers it must succeed; it returns how many there are.
pub fn losses(
    seeds: std::ops::Range<u64>,
    mut attempt: impl FnMut(u64, Option<u32>) -> Result<u32, String>,
) -> Vec<bool> {
    let mut found = vec![];
    for seed in seeds {
        let sites = attempt(seed, None).unwrap();
        found.resize(sites as usize, false);
        for site in 0..sites {
            found[site as usize] |= attempt(seed, Some(site)).is_err();
        }
    }
    found
}

pub fn run<A>(launch: &Launch, args: &A, rng: &mut ChaCha8Rng) {
    run_without(launch, args, rng.random(), None).unwrap();
}

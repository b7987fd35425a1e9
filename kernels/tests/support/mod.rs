//! Poisoned memory, random layers and the simulation, for tests of kernels.
#![allow(dead_code)] // each test uses its part

pub mod blocks;

use dynamoe_kernels::args::{Address, FfnArgs, Segment};
use dynamoe_kernels::plan::{Float, Launch};
use dynamoe_kernels::reference::{Ffn, Matrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

/// A generator with a seed that a failing test prints.
pub fn rng() -> ChaCha8Rng {
    let seed = rand::random();
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
    fn columns(&self, float: Float, range: std::ops::Range<usize>) -> Memory {
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
    Narrow,
    Wide,
    Mixed,
}

pub const MIXES: [Mix; 3] = [Mix::Narrow, Mix::Wide, Mix::Mixed];

pub fn experts(rng: &mut ChaCha8Rng, mix: Mix, tokens: usize, count: usize) -> Vec<u32> {
    let largest = count as u32 - 1;
    let one = |_| match mix {
        Mix::Narrow => 0,
        Mix::Wide => largest,
        Mix::Mixed => rng.random_range(0..=largest),
    };
    (0..tokens).map(one).collect()
}

/// An FFN and its input, in memory as the kernels read it.
pub struct Layer {
    pub float: Float,
    pub tokens: usize,
    pub d: usize,
    pub widths: Vec<usize>,
    pub experts: Vec<u32>,
    pub x: Strided,
    pub gate: Strided,
    pub up: Strided,
    pub down: Strided,
    pub compensation: Vec<f64>,
    shells: Vec<Memory>,
    held: Vec<Memory>,
}

impl Layer {
    pub fn random(
        rng: &mut ChaCha8Rng,
        float: Float,
        [tokens, d]: [usize; 2],
        widths: &[usize],
        mix: Mix,
    ) -> Self {
        let i = widths[widths.len() - 1];
        let weight = 1.0 / (d as f64).sqrt();
        let compensated = rng.random_bool(0.7);
        Self {
            float,
            tokens,
            d,
            widths: widths.to_vec(),
            experts: experts(rng, mix, tokens, widths.len()),
            x: Strided::random(rng, float, [tokens, d], 2.0),
            gate: Strided::random(rng, float, [i, d], 2.0 * weight),
            up: Strided::random(rng, float, [i, d], 2.0 * weight),
            down: Strided::random(rng, float, [d, i], 1.0),
            compensation: if compensated { floats(rng, (widths.len() - 1) * d, 1.0) } else { vec![] },
            shells: vec![],
            held: vec![],
        }
    }

    pub fn intermediate_size(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    fn hold(&mut self, memory: Memory) -> Address {
        self.held.push(memory);
        self.held[self.held.len() - 1].address()
    }

    /// The whole FFN as one segment.
    pub fn prefixes(&self) -> Vec<Segment> {
        vec![Segment {
            gate: self.gate.memory.address(),
            up: self.up.memory.address(),
            down: self.down.memory.address(),
            start: 0,
            end: self.intermediate_size() as u32,
            gate_stride: self.gate.stride as u32,
            up_stride: self.up.stride as u32,
            down_stride: self.down.stride as u32,
            reserved: 0,
        }]
    }

    /// A segment for each shell, with matrices of its own.
    pub fn shells(&mut self) -> Vec<Segment> {
        let mut start = 0;
        let mut segments = Vec::new();
        for &end in &self.widths {
            let rows = |m: &Strided| encode(self.float, &m.values[start * m.stride..end * m.stride]);
            let matrices = [rows(&self.gate), rows(&self.up), self.down.columns(self.float, start..end)];
            let [gate, up, down] = [0, 1, 2].map(|m: usize| matrices[m].address());
            self.shells.extend(matrices);
            segments.push(Segment {
                gate,
                up,
                down,
                start: start as u32,
                end: end as u32,
                gate_stride: self.gate.stride as u32,
                up_stride: self.up.stride as u32,
                down_stride: (end - start) as u32,
                reserved: 0,
            });
            start = end;
        }
        segments
    }

    /// Arguments without the addresses of `h` and `y`.
    pub fn args(&mut self, segments: &[Segment]) -> FfnArgs {
        let widths: Vec<u32> = self.experts.iter().map(|&e| self.widths[e as usize] as u32).collect();
        let compensation: Vec<f32> = self.compensation.iter().map(|&c| c as f32).collect();
        let mut all = [Segment::default(); dynamoe_kernels::MAX_SEGMENTS];
        all[..segments.len()].copy_from_slice(segments);
        FfnArgs {
            x: self.x.memory.address(),
            compensation: if compensation.is_empty() { 0 } else { self.hold(Memory::of(&compensation)) },
            experts: self.hold(Memory::of(&self.experts)),
            widths: self.hold(Memory::of(&widths)),
            tokens: self.tokens as u32,
            hidden_size: self.d as u32,
            intermediate_size: self.intermediate_size() as u32,
            expert_count: self.widths.len() as u32,
            x_stride: self.x.stride as u32,
            segment_count: segments.len() as u32,
            segments: all,
            ..FfnArgs::default()
        }
    }

    pub fn reference(&self) -> Ffn<'_> {
        Ffn {
            x: self.x.view(),
            gate_proj: self.gate.view(),
            up_proj: self.up.view(),
            down_proj: self.down.view(),
            compensation: &self.compensation,
            experts: &self.experts,
            expert_widths: &self.widths,
            hidden_size: self.d,
        }
    }

    /// Compares `h (T, I)`, whose row `r` is that of token `order[r]`, with the reference's. Compares `y (T, D)` with what the
    /// reference computes from that `h`. The error names the first difference.
    ///
    /// So each half is judged by its own rounding. Rounding `h` to bf16 may turn a sum in another order into a step of
    /// 1/256; a bound for `y` that allows for that would be too wide.
    pub fn compare(&self, h: &[f64], y: &[f64], order: &[u32]) -> Result<(), String> {
        assert_eq!([h.len(), y.len()], [self.intermediate_size(), self.d].map(|n| self.tokens * n));
        let reference = self.reference();
        for (row, &token) in h.chunks(self.intermediate_size()).zip(order) {
            let token = token as usize;
            let ranges = reference.hidden_range(token, &|x| round(self.float, x));
            for (j, (&found, [low, high])) in row.iter().zip(&ranges).enumerate() {
                if !(*low..=*high).contains(&found) {
                    return Err(format!(
                        "token {token}, neuron {j}: found {found}, expected {low} to {high}"
                    ));
                }
            }
            let h = &row[..ranges.len()];
            for (d, expected) in reference.output(token, h).into_iter().enumerate() {
                let error = reference.output_error(d, h);
                let [low, high] = [expected - error, expected + error].map(|y| round(self.float, y));
                let found = y[token * self.d + d];
                if !(low..=high).contains(&found) {
                    return Err(format!(
                        "token {token}, column {d}: found {found}, expected {low} to {high}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The tokens in their own order.
    pub fn in_order(&self) -> Vec<u32> {
        (0..self.tokens as u32).collect()
    }
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

pub fn run<A>(launch: &Launch, args: &A, rng: &mut ChaCha8Rng) {
    run_without(launch, args, rng.random(), None).unwrap();
}

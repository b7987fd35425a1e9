//! Random layers.

use std::ops::Range;

use dynamoe_kernels::args::{Address, FfnArgs, Segment, Serves};
use dynamoe_kernels::plan::Float;
use dynamoe_kernels::reference::{Ffn, Weights};
use dynamoe_kernels::segments::list;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Memory, Mix, Strided, encode, experts, floats, round};

/// The weights of `neurons` neurons.
pub struct Matrices {
    pub gate: Strided,
    pub up: Strided,
    pub down: Strided,
    pub neurons: usize,
}

impl Matrices {
    fn random(rng: &mut ChaCha8Rng, float: Float, d: usize, neurons: usize) -> Self {
        let weight = 2.0 / (d as f64).sqrt();
        Self {
            gate: Strided::random(rng, float, [neurons, d], weight),
            up: Strided::random(rng, float, [neurons, d], weight),
            down: Strided::random(rng, float, [d, neurons], 1.0),
            neurons,
        }
    }

    pub fn view(&self) -> Weights<'_> {
        Weights {
            gate_proj: self.gate.view(),
            up_proj: self.up.view(),
            down_proj: self.down.view(),
            neurons: self.neurons,
        }
    }

    /// All of them as one segment.
    fn whole(&self) -> Segment {
        Segment {
            gate: self.gate.memory.address(),
            up: self.up.memory.address(),
            down: self.down.memory.address(),
            start: 0,
            end: self.neurons as u32,
            gate_stride: self.gate.stride as u32,
            up_stride: self.up.stride as u32,
            down_stride: self.down.stride as u32,
            serves: Serves::AllTokens,
        }
    }

    /// Some of them as a segment in matrices of its own.
    fn part(&self, float: Float, range: Range<usize>) -> (Segment, [Memory; 3]) {
        let rows = |m: &Strided| encode(float, &m.values[range.start * m.stride..range.end * m.stride]);
        let matrices = [rows(&self.gate), rows(&self.up), self.down.columns(float, range.clone())];
        let [gate, up, down] = [0, 1, 2].map(|m: usize| matrices[m].address());
        let [start, end] = [range.start as u32, range.end as u32];
        (Segment { gate, up, down, start, end, down_stride: end - start, ..self.whole() }, matrices)
    }

    /// Makes the weights of neurons NaN, which must then not be read.
    pub fn poison(&mut self, float: Float, neurons: Range<usize>) {
        for matrix in [&mut self.gate, &mut self.up] {
            matrix.values[neurons.start * matrix.stride..neurons.end * matrix.stride].fill(f64::NAN);
            matrix.memory = encode(float, &matrix.values);
        }
        let down = &mut self.down;
        down.values.chunks_mut(down.stride).for_each(|row| row[neurons.clone()].fill(f64::NAN));
        down.memory = encode(float, &down.values);
    }
}

/// An FFN and its input, in memory as the kernels read it.
pub struct Layer {
    pub float: Float,
    pub tokens: usize,
    pub d: usize,
    pub widths: Vec<usize>,
    pub experts: Vec<u32>,
    pub x: Strided,
    pub dense: Matrices,
    pub separate: Option<Matrices>,
    pub compensation: Vec<f64>,
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
        let compensated = rng.random_bool(0.7);
        Self {
            float,
            tokens,
            d,
            widths: widths.to_vec(),
            experts: experts(rng, mix, tokens, widths.len()),
            x: Strided::random(rng, float, [tokens, d], 2.0),
            dense: Matrices::random(rng, float, d, widths[widths.len() - 1]),
            separate: None,
            compensation: if compensated { floats(rng, (widths.len() - 1) * d, 1.0) } else { vec![] },
            held: vec![],
        }
    }

    /// The same with separate weights for that many first shells.
    pub fn with_separate(self, rng: &mut ChaCha8Rng, shells: usize) -> Self {
        let neurons = shells.checked_sub(1).map(|last| self.widths[last]);
        let separate = neurons.map(|neurons| Matrices::random(rng, self.float, self.d, neurons));
        Self { separate, ..self }
    }

    /// How many first shells can have separate weights: these end at whole vectors of 16 bytes.
    pub fn separate_shells(widths: &[usize], multiple: usize) -> impl Iterator<Item = usize> + '_ {
        (1..widths.len()).filter(move |shells| widths[shells - 1].is_multiple_of(multiple))
    }

    /// What a failing test prints.
    pub fn name(&self) -> String {
        let Self { float, tokens, d, widths, experts, .. } = self;
        let separate = self.separate.as_ref().map_or(0, |separate| separate.neurons);
        format!("{float:?} {tokens} {d} {widths:?}, separate {separate}, experts {experts:?}")
    }

    /// Makes the weights NaN that no token needs. Returns the number of the other neurons.
    pub fn poison_unneeded(&mut self) -> usize {
        let largest = self.widths.len() - 1;
        let of = |e: &u32| self.widths[*e as usize];
        let full = self.experts.iter().map(of).filter(|&w| w == self.widths[largest]).max().unwrap_or(0);
        let below = self.experts.iter().map(of).filter(|&w| w < self.widths[largest]).max().unwrap_or(0);
        let below = below.next_multiple_of(8);
        let separate = self.separate.as_ref().map_or(0, |separate| separate.neurons);
        let first = if separate > 0 { full.min(separate) } else { 0 };
        let last = full.max(below).max(separate);
        let needed = below.min(separate);
        let ranges = [first..separate, last..self.dense.neurons];
        ranges.into_iter().for_each(|range| self.dense.poison(self.float, range));
        self.separate.iter_mut().for_each(|weights| weights.poison(self.float, needed..separate));
        first + last - separate + needed
    }

    pub fn intermediate_size(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    fn hold(&mut self, memory: Memory) -> Address {
        self.held.push(memory);
        self.held[self.held.len() - 1].address()
    }

    /// The whole FFN as one segment, and separate weights as another; or each shell as one, in matrices of its own.
    pub fn segments(&mut self, in_shells: bool) -> Vec<Segment> {
        let float = self.float;
        let mut held = vec![];
        let mut of = |matrices: &Matrices| {
            if !in_shells {
                return vec![matrices.whole()];
            }
            let mut start = 0;
            let shells = self.widths.iter().take_while(|&&end| end <= matrices.neurons).map(|&end| {
                let (segment, memory) = matrices.part(float, std::mem::replace(&mut start, end)..end);
                held.extend(memory);
                segment
            });
            shells.collect()
        };
        let (dense, separate) = (of(&self.dense), self.separate.as_ref().map(&mut of).unwrap_or_default());
        self.held.extend(held);
        list(&dense, &separate, [float.into(); 2])
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
            separate_size: self.separate.as_ref().map_or(0, |separate| separate.neurons as u32),
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
            dense: self.dense.view(),
            separate: self.separate.as_ref().map(Matrices::view),
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
                let error = reference.output_error(token, d, h);
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

//! What each kernel computes, in f64 and in plain loops. The tests compare kernels with these, in the simulation and on a
//! GPU.

use crate::plan::Block;

/// A matrix with a stride.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// The numbers; row `r` starts at `r · stride`.
    pub data: &'a [f64],
    /// Numbers from one row to the next.
    pub stride: usize,
}

impl<'a> Matrix<'a> {
    /// The first `columns` numbers of a row.
    pub fn row(&self, row: usize, columns: usize) -> &'a [f64] {
        &self.data[row * self.stride..][..columns]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The distance between neighbouring numbers in f32, relative to them. Tensor cores truncate, so each sum may be off by the
/// whole distance.
const F32_STEP: f64 = 1.0 / 8_388_608.0;

/// The largest error of a dot product in f32.
fn sum_error(a: &[f64], b: &[f64]) -> f64 {
    (a.len() + 8) as f64 * F32_STEP * a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Router, as [`crate::args::RouteArgs`] describes it.
#[derive(Debug, Clone, Copy)]
pub struct Route<'a> {
    /// `(T, D)`
    pub x: Matrix<'a>,
    /// `(R, D)`
    pub fc1: Matrix<'a>,
    /// `(R)`
    pub fc1_bias: &'a [f64],
    /// `(E-1, R)`
    pub fc2: Matrix<'a>,
    /// `(E-1)`
    pub fc2_bias: &'a [f64],
    /// `T`
    pub tokens: usize,
    /// `D`
    pub hidden_size: usize,
}

impl Route<'_> {
    /// Logits of each token, `(T, E-1)`. The expert is the first whose logit reaches the threshold, else the largest.
    pub fn logits(&self) -> Vec<Vec<f64>> {
        let token = |t: usize| -> Vec<f64> {
            let x = self.x.row(t, self.hidden_size);
            let hidden: Vec<f64> = (self.fc1_bias.iter().enumerate())
                .map(|(r, bias)| silu(dot(x, self.fc1.row(r, self.hidden_size)) + bias))
                .collect();
            let logit = |(e, bias): (usize, &f64)| dot(&hidden, self.fc2.row(e, hidden.len())) + bias;
            self.fc2_bias.iter().enumerate().map(logit).collect()
        };
        (0..self.tokens).map(token).collect()
    }
}

/// Tokens by expert, widest first. Tokens of one expert keep their order.
pub fn sort(experts: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..experts.len() as u32).collect();
    order.sort_by_key(|&token| std::cmp::Reverse(experts[token as usize]));
    order
}

/// The weights of `n` neurons.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// `(n, D)`
    pub gate_proj: Matrix<'a>,
    /// `(n, D)`
    pub up_proj: Matrix<'a>,
    /// `(D, n)`
    pub down_proj: Matrix<'a>,
    /// `n`
    pub neurons: usize,
}

/// The FFN, as [`crate::args::FfnArgs`] describes it.
#[derive(Debug, Clone, Copy)]
pub struct Ffn<'a> {
    /// `(T, D)`
    pub x: Matrix<'a>,
    /// All `I` neurons.
    pub dense: Weights<'a>,
    /// What experts but the largest have in place of the first neurons.
    pub separate: Option<Weights<'a>>,
    /// `(E-1, D)`, or empty.
    pub compensation: &'a [f64],
    /// Expert of each token.
    pub experts: &'a [u32],
    /// `H_e` of each expert.
    pub expert_widths: &'a [usize],
    /// `D`
    pub hidden_size: usize,
}

impl<'a> Ffn<'a> {
    fn width(&self, token: usize) -> usize {
        self.expert_widths[self.experts[token] as usize]
    }

    /// The separate weights, for a token that has them.
    fn separate(&self, token: usize) -> Option<Weights<'a>> {
        self.separate.filter(|_| self.experts[token] as usize + 1 < self.expert_widths.len())
    }

    /// A token's gate and up weights of neuron `j`.
    fn neuron(&self, token: usize, j: usize) -> [&'a [f64]; 2] {
        let weights = self.separate(token).filter(|separate| j < separate.neurons).unwrap_or(self.dense);
        [weights.gate_proj, weights.up_proj].map(|matrix| matrix.row(j, self.hidden_size))
    }

    /// A token's first weights of column `d` of its output.
    pub fn down(&self, token: usize, d: usize, len: usize) -> Vec<f64> {
        let mut row = self.dense.down_proj.row(d, len).to_vec();
        if let Some(Weights { down_proj, neurons, .. }) = self.separate(token) {
            let neurons = neurons.min(len);
            row[..neurons].copy_from_slice(down_proj.row(d, neurons));
        }
        row
    }

    /// `h` of one token, up to its width. `round` is the rounding of the type that stores it.
    pub fn hidden(&self, token: usize, round: &dyn Fn(f64) -> f64) -> Vec<f64> {
        let x = self.x.row(token, self.hidden_size);
        let neuron = |j: usize| {
            let [gate, up] = self.neuron(token, j);
            round(silu(dot(x, gate)) * dot(x, up))
        };
        (0..self.width(token)).map(neuron).collect()
    }

    /// The smallest and the largest `h` of one token that f32 sums in any order may give, after `round`. They differ only
    /// where the error of the sums crosses a step of the type that stores it.
    pub fn hidden_range(&self, token: usize, round: &dyn Fn(f64) -> f64) -> Vec<[f64; 2]> {
        let x = self.x.row(token, self.hidden_size);
        let neuron = |j: usize| {
            let [gate, up] = self.neuron(token, j);
            let (by_gate, by_up) = (sum_error(x, gate), sum_error(x, up));
            let (gate, up) = (dot(x, gate), dot(x, up));
            // the slope of silu is at most 1.1; its exponential is off by the rounding of its argument and a few steps
            let silu_error = 1.1 * by_gate + (gate.abs() + 8.0) * F32_STEP * silu(gate).abs();
            let (h, size) = (silu(gate) * up, silu(gate).abs() + silu_error);
            let error = size * by_up + silu_error * up.abs() + h.abs() * F32_STEP;
            [round(h - error), round(h + error)]
        };
        (0..self.width(token)).map(neuron).collect()
    }

    /// The largest error of `y` of one token in column `d`, before it is stored, if `h` is exact: that of a sum in f32 in
    /// any order.
    pub fn output_error(&self, token: usize, d: usize, h: &[f64]) -> f64 {
        // compensation is one more term, of about its own size
        sum_error(h, &self.down(token, d, h.len())) + 4.0 * F32_STEP
    }

    /// `y` of one token, `(D)`, from its `h`.
    pub fn output(&self, token: usize, h: &[f64]) -> Vec<f64> {
        let expert = self.experts[token] as usize;
        let narrow = expert + 1 < self.expert_widths.len() && !self.compensation.is_empty();
        let column = |d: usize| {
            let extra = if narrow { self.compensation[expert * self.hidden_size + d] } else { 0.0 };
            dot(h, &self.down(token, d, h.len())) + extra
        };
        (0..self.hidden_size).map(column).collect()
    }
}

/// 32 numbers as one scale and 8 bits each.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedBlock {
    /// `x ≈ scale · q`
    pub scale: f32,
    /// −127 to 127.
    pub q: Vec<i8>,
}

/// What the kernel `quantize` makes of a block of 32, computed in the same precision.
pub fn quantize(block: &[f64]) -> QuantizedBlock {
    let largest = block.iter().fold(0f32, |m, &x| m.max((x as f32).abs()));
    let scale = largest / 127.0;
    let one = |&x: &f64| if scale > 0.0 { (x as f32 / scale).round_ties_even() as i8 } else { 0 };
    QuantizedBlock { scale, q: block.iter().map(one).collect() }
}

/// Numbers as they are after [`quantize`], in blocks of 32.
pub fn requantize(row: &[f64]) -> Vec<f64> {
    let block = |block: &[f64]| {
        let QuantizedBlock { scale, q } = quantize(block);
        q.into_iter().map(move |q| f64::from(scale) * f64::from(q))
    };
    row.chunks(32).flat_map(block).collect()
}

/// The weights that GGUF's blocks stand for.
pub fn dequantize(block: Block, bytes: &[u8]) -> Vec<f64> {
    let blocks = bytes.chunks_exact(block.bytes());
    match block {
        Block::Q8_0 => blocks.flat_map(|b| b[2..].iter().map(|&q| half(b, 0) * f64::from(q as i8))).collect(),
        Block::Q4K => blocks.flat_map(|b| (0..256).map(|at| q4k(b, at))).collect(),
    }
}

fn half(bytes: &[u8], at: usize) -> f64 {
    let bits = i32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (sign, exponent, mantissa) = (bits >> 15, bits >> 10 & 31, f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// Weight `at` of a block: eight sub-blocks of 32, two of which share 32 bytes, the even one in the low nibbles.
fn q4k(block: &[u8], at: usize) -> f64 {
    let (scales, nibbles) = (&block[4..16], &block[16..]);
    let sub = at / 32;
    let (scale, minimum) = if sub < 4 {
        (scales[sub] & 63, scales[sub + 4] & 63)
    } else {
        let low = scales[sub + 4];
        (low & 15 | scales[sub - 4] >> 6 << 4, low >> 4 | scales[sub] >> 6 << 4)
    };
    let byte = nibbles[sub / 2 * 32 + at % 32];
    let q = if sub.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
    half(block, 0) * f64::from(scale) * f64::from(q) - half(block, 2) * f64::from(minimum)
}

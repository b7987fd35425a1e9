//! Decoding with quantized weights against the reference.

mod support;

use dynamoe_kernels::args::{FfnArgs, QuantizeArgs, Quantized};
use dynamoe_kernels::plan::{self, Block, Float};
use dynamoe_kernels::reference::{self, Ffn, Matrix};
use dynamoe_kernels::segments::list;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::blocks::Shells;
use support::{
    FLOATS, MIXES, Memory, Mix, SEPARATE_MIXES, Strided, decode, epsilon, experts, floats, lengths, losses,
    rng, round, run, run_without,
};

/// Memory for `(rows, columns)` of quantized activations.
struct Activations {
    q: Memory,
    scales: Memory,
    sums: Memory,
}

impl Activations {
    fn poisoned(rows: usize, columns: usize) -> Self {
        let numbers = rows * columns;
        Self {
            q: Memory::poisoned(numbers),
            scales: Memory::poisoned(numbers / 32 * 4),
            sums: Memory::poisoned(numbers / 16 * 4),
        }
    }

    fn args(&self) -> Quantized {
        Quantized { q: self.q.address(), scales: self.scales.address(), sums: self.sums.address() }
    }
}

#[test]
fn quantizing_equals_the_reference() {
    let mut rng = rng();
    for float in FLOATS {
        for (tokens, columns) in [(0, 256), (1, 32), (3, 288), (9, 512)] {
            let x = Strided::random(&mut rng, float, [tokens, columns], 3.0);
            let out = Activations::poisoned(tokens, columns);
            let args = QuantizeArgs {
                x: x.memory.address(),
                out: out.args(),
                tokens: tokens as u32,
                columns: columns as u32,
                x_stride: x.stride as u32,
                ..QuantizeArgs::default()
            };
            run(&plan::quantize(float, tokens, columns), &args, &mut rng);
            let (mut q, mut scales, mut sums) = (vec![], vec![], vec![]);
            for token in 0..tokens {
                for block in x.view().row(token, columns).chunks(32) {
                    let expected = reference::quantize(block);
                    sums.extend(
                        expected
                            .q
                            .chunks(16)
                            .map(|h| expected.scale * h.iter().map(|&q| f32::from(q)).sum::<f32>()),
                    );
                    scales.push(expected.scale);
                    q.extend(expected.q);
                }
            }
            assert_eq!((out.q.read::<i8>(), out.scales.read::<f32>()), (q, scales));
            assert_eq!(out.sums.read::<f32>(), sums);
        }
    }
}

/// An FFN in blocks.
struct Case {
    float: Float,
    block: [Block; 2],
    tokens: usize,
    d: usize,
    widths: Vec<usize>,
    experts: Vec<u32>,
    x: Strided,
    dense: Shells,
    separate: Shells,
    compensation: Vec<f64>,
}

impl Case {
    /// The first `separate` shells twice.
    fn random(
        rng: &mut ChaCha8Rng,
        block: [Block; 2],
        [tokens, d]: [usize; 2],
        widths: &[usize],
        (mix, separate): (Mix, usize),
    ) -> Self {
        let float = FLOATS[rng.random_range(0..3)];
        Self {
            dense: Shells::random(rng, block, d, widths),
            separate: Shells::random(rng, block, d, &widths[..separate]),
            float,
            block,
            tokens,
            d,
            widths: widths.to_vec(),
            experts: experts(rng, mix, tokens, widths.len()),
            x: Strided::random(rng, float, [tokens, d], 2.0),
            compensation: floats(rng, (widths.len() - 1) * d, 1.0),
        }
    }

    /// Runs all four launches and compares `y`.
    fn attempt(&self, seed: u64, without: Option<u32>) -> Result<u32, String> {
        let (t, d, i) = (self.tokens, self.d, self.widths[self.widths.len() - 1]);
        let widths: Vec<u32> = self.experts.iter().map(|&e| self.widths[e as usize] as u32).collect();
        let compensation: Vec<f32> = self.compensation.iter().map(|&c| c as f32).collect();
        let held = [Memory::of(&widths), Memory::of(&self.experts), Memory::of(&compensation)];
        let segments = list(&self.dense.segments(), &self.separate.segments(), self.block.map(Into::into));
        let (xq, hq) = (Activations::poisoned(t, d), Activations::poisoned(t, i));
        let (h, y) = (Memory::poisoned(t * i * 4), Memory::poisoned(t * d * self.float.bytes()));
        let mut args = FfnArgs {
            h: h.address(),
            y: y.address(),
            widths: held[0].address(),
            experts: held[1].address(),
            compensation: if compensation.is_empty() { 0 } else { held[2].address() },
            xq: xq.args(),
            hq: hq.args(),
            tokens: t as u32,
            hidden_size: d as u32,
            intermediate_size: i as u32,
            expert_count: self.widths.len() as u32,
            segment_count: segments.len() as u32,
            separate_size: self.separate.neurons() as u32,
            ..FfnArgs::default()
        };
        args.segments[..segments.len()].copy_from_slice(&segments);
        let [gate_up, down] = plan::decode_quantized(self.block, self.float, t, d, &lengths(&segments));
        let quantize = |x: &Memory, out: &Activations, [columns, stride]: [usize; 2], widths| QuantizeArgs {
            x: x.address(),
            out: out.args(),
            widths,
            tokens: t as u32,
            columns: columns as u32,
            x_stride: stride as u32,
            separate_size: if widths == 0 { 0 } else { args.separate_size },
        };
        let of_x = quantize(&self.x.memory, &xq, [d, self.x.stride], 0);
        run_without(&plan::quantize(self.float, t, d), &of_x, seed, None)?;
        let sites = run_without(&gate_up, &args, seed, without)?;
        let of_h = quantize(&h, &hq, [i, i], args.widths);
        run_without(&plan::quantize(Float::F32, t, i), &of_h, seed, None)?;
        run_without(&down, &args, seed, without)?;
        self.compare(&decode(self.float, &y))?;
        Ok(sites)
    }

    fn compare(&self, y: &[f64]) -> Result<(), String> {
        let d = self.d;
        // activations as the kernels see them; weights in one piece
        let seen: Vec<f64> =
            (0..self.tokens).flat_map(|t| reference::requantize(self.x.view().row(t, d))).collect();
        let [dense, separate] = [&self.dense, &self.separate].map(|shells| shells.matrices(Float::F32));
        let ffn = Ffn {
            x: Matrix { data: &seen, stride: d },
            dense: dense.view(),
            separate: (separate.neurons > 0).then(|| separate.view()),
            compensation: &self.compensation,
            experts: &self.experts,
            expert_widths: &self.widths,
            hidden_size: d,
        };
        for token in 0..self.tokens {
            let h = ffn.hidden(token, &|x| round(Float::F32, x));
            // blocks end with zeros where the expert ends
            let mut padded = h.clone();
            padded.resize(h.len().next_multiple_of(32), 0.0);
            let h = &reference::requantize(&padded)[..h.len()];
            for (c, (&found, expected)) in y[token * d..].iter().zip(ffn.output(token, h)).enumerate() {
                let row = &ffn.down(token, c, h.len());
                let terms: f64 = h.iter().zip(row).map(|(h, w)| (h * w).abs()).sum();
                // f32 sums in another order: 1e-5 of the terms' sum covers some 80 steps of 2⁻²³. They may also round one
                // number of h the other way: a step of its 8 bits is 1/127 of the largest number in its block, and y takes
                // that times a weight.
                let largest = |v: &[f64]| v.iter().fold(0f64, |m, x| m.max(x.abs()));
                let tolerance = epsilon(self.float) * expected.abs()
                    + 1e-5
                    + 1e-5 * terms
                    + largest(h) * largest(row) / 127.0;
                let error = (found - expected).abs();
                if error.is_nan() || error > tolerance {
                    return Err(format!("token {token}, column {c}: found {found}, expected {expected}"));
                }
            }
        }
        Ok(())
    }
}

const FORMATS: [[Block; 2]; 3] =
    [[Block::Q4K, Block::Q4K], [Block::Q8_0, Block::Q8_0], [Block::Q4K, Block::Q8_0]];

const SHAPES: [(usize, usize, &[usize]); 7] = [
    (0, 256, &[256]),
    (1, 256, &[256, 512]),
    (1, 1536, &[256]),
    (2, 512, &[256, 768]),
    (3, 256, &[512, 768, 1792]),
    (8, 768, &[256, 512]),
    (11, 256, &[256, 512]),
];

fn check(case: &Case, rng: &mut ChaCha8Rng) {
    case.attempt(rng.random(), None).unwrap_or_else(|e| {
        let Case { block, tokens, d, widths, experts, separate, .. } = case;
        let separate = separate.neurons();
        panic!("{block:?} {tokens} {d} {widths:?}, separate {separate}, experts {experts:?}: {e}")
    });
}

#[test]
fn quantized_decoding_equals_the_reference() {
    let mut rng = rng();
    for block in FORMATS {
        for (tokens, d, widths) in SHAPES {
            for mix in MIXES {
                check(&Case::random(&mut rng, block, [tokens, d], widths, (mix, 0)), &mut rng);
            }
        }
    }
}

#[test]
fn separate_weights_serve_tokens_below_full_width() {
    let mut rng = rng();
    for (tokens, d, widths) in SHAPES {
        for separate in 1..widths.len() {
            for mix in SEPARATE_MIXES {
                let block = FORMATS[rng.random_range(0..3)];
                let mut case = Case::random(&mut rng, block, [tokens, d], widths, (mix, separate));
                Shells::poison_unneeded([&mut case.dense, &mut case.separate], &case.experts);
                check(&case, &mut rng);
            }
        }
    }
}

#[test]
fn a_missing_wait_is_found() {
    let mut rng = rng();
    let case = Case::random(&mut rng, [Block::Q8_0; 2], [2, 3072], &[256], (Mix::Wide, 0));
    let found = losses(0..4, |seed, without| case.attempt(seed, without));
    assert_eq!(found, [true; 3], "the wait for copies and both barriers are needed, and their loss is seen");
}

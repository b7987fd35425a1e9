//! Kernels of every variant against f64, over lists of types and shapes, on fresh random weights and inputs.
//! Memory that is yet to be written holds NaN here.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Activation;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::isa::Isa;
use super::{PackedExperts, PackedMatrix};
use crate::{NestedExperts, Shell};

const CPU: Device = Device::Cpu;
const TYPES: [GgmlDType; 6] =
    [GgmlDType::F32, GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];

/// Error of a sum in f32, relative to the sum of its terms' sizes.
const SUM: f64 = 1e-6;

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(rand::random())
}

/// Miri runs everything, but less of it.
fn few<T: Copy>(all: &[T], under_miri: usize) -> &[T] {
    if cfg!(miri) { &all[..under_miri.min(all.len())] } else { all }
}

/// Blocks of random bits: every scale, minimum and code occurs.
fn random_weight(rng: &mut ChaCha8Rng, dtype: GgmlDType, n: usize, k: usize) -> QTensor {
    let blocks = n * k / dtype.block_size();
    // words, so that f32 is aligned
    let mut words: Vec<u32> = (0..(blocks * dtype.type_size()).div_ceil(4)).map(|_| rng.random()).collect();
    if dtype == GgmlDType::F32 {
        words.iter_mut().for_each(|w| *w = rng.random_range(-1f32..1.0).to_bits());
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.truncate(blocks * dtype.type_size());
    let floats: &[usize] = match dtype {
        GgmlDType::F32 => &[],
        GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q6K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(dtype.type_size()) {
        for &at in floats {
            let scale = half::f16::from_f32(rng.random_range(-0.02f32..0.02));
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
        let mut le = [0; 4];
        le[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(le);
    }
    // SAFETY: words are plain bytes
    let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), bytes.len()) };
    QTensor::new(QStorage::from_data(Cow::Borrowed(bytes), &CPU, dtype).unwrap(), (n, k)).unwrap()
}

fn random_input(rng: &mut ChaCha8Rng, tokens: usize, k: usize) -> Tensor {
    let mut data: Vec<f32> = (0..tokens * k).map(|_| rng.random_range(-3f32..3.0)).collect();
    // some blocks of zeros, some values that tie in magnitude
    for block in data.chunks_exact_mut(32) {
        match rng.random_range(0..10) {
            0 => block.fill(0.0),
            1 => (block[3], block[17]) = (3.5, -3.5),
            2 => (block[3], block[17]) = (-3.5, 3.5),
            _ => {}
        }
    }
    Tensor::from_vec(data, (tokens, k), &CPU).unwrap()
}

/// The input as the type's kernels see it, rounded by candle.
fn rounded(x: &Tensor, dtype: GgmlDType) -> Vec<f64> {
    let kind = match dtype {
        GgmlDType::F32 => None,
        GgmlDType::Q4_0 | GgmlDType::Q8_0 => Some(GgmlDType::Q8_0),
        _ => Some(GgmlDType::Q8K),
    };
    let x = match kind {
        Some(kind) if x.elem_count() > 0 => {
            QTensor::quantize(&x.contiguous().unwrap(), kind).unwrap().dequantize(&CPU).unwrap()
        }
        _ => x.clone(),
    };
    flat(&x)
}

fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `x · Wᵀ` and `|x| · |W|ᵀ`, the scale of rounding errors.
fn product(x: &[f64], w: &[f64], k: usize) -> (Vec<f64>, Vec<f64>) {
    if k == 0 {
        return Default::default();
    }
    let pairs = x.chunks_exact(k).flat_map(|x| {
        w.chunks_exact(k).map(move |w| {
            x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
        })
    });
    pairs.unzip()
}

fn assert_close(found: &[f64], expected: &[f64], size: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, ((a, b), size)) in found.iter().zip(expected).zip(size).enumerate() {
        assert!((a - b).abs() <= tolerance * (size + 1e-20), "{what}, at {at}: found {a}, expected {b}");
    }
}

fn shapes(dtype: GgmlDType) -> Vec<(usize, usize)> {
    let block = dtype.block_size().max(3);
    let mut shapes = vec![(17, block), (1, 3 * block), (40, 5 * block)];
    if !cfg!(miri) {
        shapes.extend([(16, 2 * block), (256, 4 * block), (33, 9 * block)]);
    }
    shapes
}

#[test]
fn products_equal_the_reference() {
    let mut rng = rng();
    for isa in Isa::available() {
        for dtype in TYPES {
            for (n, k) in shapes(dtype) {
                let weight = random_weight(&mut rng, dtype, n, k);
                let packed = PackedMatrix::from_qtensor(&weight).unwrap();
                let w = flat(&weight.dequantize(&CPU).unwrap());
                for &tokens in few(&[3, 13, 0, 1, 2, 7, 8, 9, 12, 16, 64, 513], 2) {
                    if n * k * tokens > 1 << 22 {
                        continue;
                    }
                    let x = random_input(&mut rng, tokens, k);
                    let (expected, size) = product(&rounded(&x, dtype), &w, k);
                    let rows: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                    let y: Vec<f64> =
                        packed.forward_rows(isa, &rows, tokens).into_iter().map(f64::from).collect();
                    let what = format!("{} {dtype:?} ({n}, {k}) × {tokens}", isa.name());
                    assert_close(&y, &expected, &size, SUM, &what);
                }
            }
        }
    }
}

#[test]
fn products_follow_candle() {
    let mut rng = rng();
    for dtype in TYPES {
        let (n, k) = (50, 2 * dtype.block_size().max(96));
        let weight = random_weight(&mut rng, dtype, n, k);
        let packed = PackedMatrix::from_qtensor(&weight).unwrap();
        let x = random_input(&mut rng, 5, k).reshape((1, 5, k)).unwrap();
        let y = packed.forward(&x).unwrap();
        assert_eq!(y.dims(), [1, 5, n]);
        let (_, size) = product(&flat(&x), &flat(&weight.dequantize(&CPU).unwrap()), k);
        let candle = QMatMul::from_qtensor(weight).unwrap().forward(&x).unwrap();
        assert_close(&flat(&y), &flat(&candle), &size, 2e-6, &format!("{dtype:?}"));
    }
}

#[test]
fn strided_and_half_precision_inputs() {
    let mut rng = rng();
    let packed = PackedMatrix::from_qtensor(&random_weight(&mut rng, GgmlDType::Q8_0, 20, 64)).unwrap();
    let x = random_input(&mut rng, 64, 7).to_dtype(DType::F16).unwrap();
    let strided = x.t().unwrap();
    let y = packed.forward(&strided).unwrap();
    assert_eq!((y.dims(), y.dtype()), ([7, 20].as_slice(), DType::F16));
    let exact = packed.forward(&strided.to_dtype(DType::F32).unwrap().contiguous().unwrap()).unwrap();
    assert_eq!(flat(&y), flat(&exact.to_dtype(DType::F16).unwrap()));
}

#[test]
fn packing_is_undone_bit_for_bit() {
    let mut rng = rng();
    for dtype in TYPES {
        for (n, k) in shapes(dtype) {
            let weight = random_weight(&mut rng, dtype, n, k);
            let packed = PackedMatrix::from_qtensor(&weight).unwrap();
            let back = packed.to_qtensor().unwrap();
            assert_eq!((back.shape(), back.dtype()), (weight.shape(), dtype));
            assert_eq!(back.data().unwrap(), weight.data().unwrap());
            assert_eq!(packed.bytes(), weight.storage_size_in_bytes() / n * n.next_multiple_of(16));
        }
    }
    let dense = Tensor::randn(0f32, 1.0, (5, 7), &CPU).unwrap().t().unwrap();
    let packed = PackedMatrix::from_tensor(&dense).unwrap();
    assert_eq!(flat(&packed.dequantize().unwrap()), flat(&dense));
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let weight = Tensor::zeros((4, 256), DType::F32, &CPU).unwrap();
    let weight = QTensor::quantize(&weight, GgmlDType::Q2K).unwrap();
    assert!(!PackedMatrix::supports(GgmlDType::Q2K));
    let error = PackedMatrix::from_qtensor(&weight).unwrap_err().to_string();
    assert!(error.contains("found Q2K"), "{error}");
    let packed = PackedMatrix::from_tensor(&Tensor::zeros((4, 8), DType::F32, &CPU).unwrap()).unwrap();
    assert!(packed.forward(&Tensor::zeros((1, 7), DType::F32, &CPU).unwrap()).is_err());
}

/// Shells of random weights, and the same weights in f64.
struct Layer {
    experts: PackedExperts,
    down_type: GgmlDType,
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<Vec<f64>>,
    widths: Vec<usize>,
    d: usize,
}

impl Layer {
    fn random(
        rng: &mut ChaCha8Rng,
        types: [GgmlDType; 3],
        widths: &[usize],
        d: usize,
        act: Activation,
    ) -> Self {
        let (mut gate, mut up, mut down, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let shells = widths.iter().map(|&end| {
            let width = end - start;
            start = end;
            let mut random = |dtype, n, k| {
                let weight = random_weight(rng, dtype, n, k);
                let numbers = flat(&weight.dequantize(&CPU).unwrap());
                (Arc::new(PackedMatrix::from_qtensor(&weight).unwrap()), numbers)
            };
            let parts = [random(types[0], width, d), random(types[1], width, d), random(types[2], d, width)];
            let [(gate_proj, g), (up_proj, u), (down_proj, w)] = parts;
            gate.extend(g);
            up.extend(u);
            down.push(w);
            Shell { gate_proj, up_proj, down_proj }
        });
        let experts = PackedExperts::new(shells.collect(), act, widths).unwrap();
        Self { experts, down_type: types[2], gate, up, down, widths: widths.to_vec(), d }
    }

    /// One token, given its inputs as the kernels of gate and up see them: the output, and how far from it sums
    /// in f32 may end.
    fn expected(&self, x: [&[f64]; 2], expert: usize, act: fn(f64) -> f64) -> (Vec<f64>, Vec<f64>) {
        let width = self.widths[expert];
        let (gate, gate_size) = product(x[0], &self.gate[..width * self.d], self.d);
        let (up, up_size) = product(x[1], &self.up[..width * self.d], self.d);
        let h: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| act(g) * u).collect();
        // the slopes of both activations are below 1.13
        let error = |j: usize| {
            let (g, u) = (gate[j], up[j].abs());
            SUM * (1.13 * gate_size[j] * u + act(g).abs() * up_size[j]) + 2e-6 * g.abs() * u
        };
        let errors: Vec<f64> = (0..width).map(error).collect();
        let (mut y, mut allowed, mut start) = (vec![0.0; self.d], vec![0.0; self.d], 0);
        for (down, &end) in self.down.iter().zip(&self.widths[..=expert]) {
            let (h, errors) = (&h[start..end], &errors[start..end]);
            let seen: Vec<f32> = h.iter().map(|&h| h as f32).collect();
            let seen = Tensor::from_vec(seen, (1, end - start), &CPU).unwrap();
            let (part, size) = product(&rounded(&seen, self.down_type), down, end - start);
            let (_, moved) = product(&spread(h, errors, self.down_type), down, end - start);
            for i in 0..self.d {
                y[i] += part[i];
                allowed[i] += SUM * size[i] + moved[i];
            }
            start = end;
        }
        (y, allowed)
    }
}

/// How far apart the codes' values may lie of numbers that are known to within `errors`: next to a tie one is
/// rounded to either side, and a block's scale moves with its largest number.
fn spread(h: &[f64], errors: &[f64], dtype: GgmlDType) -> Vec<f64> {
    let (block, codes) = match dtype {
        GgmlDType::F32 => return errors.iter().map(|error| 2.0 * error).collect(),
        GgmlDType::Q4_0 | GgmlDType::Q8_0 => (32, 127.0),
        _ => (256, 128.0),
    };
    let blocks = h.chunks(block).zip(errors.chunks(block)).flat_map(|(h, errors)| {
        let largest = h.iter().fold(0f64, |a, h| a.max(h.abs()));
        let error = errors.iter().fold(0f64, |a, &e| a.max(e));
        let scales = [(largest - error).max(1e-30) / codes, (largest + error) / codes];
        let spread = move |(h, error): (&f64, &f64)| {
            let mut values = Vec::new();
            for scale in scales {
                let stored = if block == 32 { half::f16::from_f64(scale).to_f64() } else { scale };
                values.extend(
                    [h - error, h + error].map(|h| (h / scale).round().clamp(-codes, codes) * stored),
                );
            }
            // Q8K has no code for the largest number's opposite
            if block == 256 && h.abs() >= largest - 2.0 * error {
                values.extend(scales.map(|scale| h.signum() * 127.0 * scale));
            }
            values.iter().fold(f64::MIN, |a, &v| a.max(v)) - values.iter().fold(f64::MAX, |a, &v| a.min(v))
        };
        h.iter().zip(errors).map(spread).collect::<Vec<_>>()
    });
    blocks.collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

#[test]
fn experts_equal_the_reference() {
    use GgmlDType::{F32, Q4_0, Q4K, Q5K, Q6K, Q8_0};
    type Case = ([GgmlDType; 3], &'static [usize], usize, Activation, fn(f64) -> f64);
    let cases: [Case; 7] = [
        ([F32; 3], &[5, 21, 40], 19, Activation::Silu, silu),
        ([Q8_0; 3], &[32, 96, 320], 64, Activation::Silu, silu),
        ([Q4K, Q4K, Q6K], &[256, 512, 1024], 256, Activation::Silu, silu),
        ([Q4K, Q8_0, Q5K], &[256, 512, 1024], 512, Activation::GeluPytorchTanh, gelu),
        ([Q4_0; 3], &[64, 352], 96, Activation::NewGelu, gelu),
        ([Q4K; 3], &[512], 256, Activation::Silu, silu),
        ([F32, Q8_0, F32], &[7, 14, 21, 300], 32, Activation::GeluPytorchTanh, gelu),
    ];
    let mut rng = rng();
    for isa in Isa::available() {
        for &(types, widths, d, act, function) in few(&cases, 2) {
            let layer = Layer::random(&mut rng, types, widths, d, act);
            for &tokens in few(&[3, 13, 0, 1, 2, 7, 8, 9, 12, 40], 2) {
                for mix in ["narrow", "wide", "mixed"] {
                    let routes: Vec<usize> = (0..tokens)
                        .map(|_| match mix {
                            "narrow" => 0,
                            "wide" => widths.len() - 1,
                            _ => rng.random_range(0..widths.len()),
                        })
                        .collect();
                    let x = random_input(&mut rng, tokens, d).affine(0.1, 0.0).unwrap();
                    let mut order: Vec<u32> = (0..tokens as u32).collect();
                    order.sort_by_key(|&row| std::cmp::Reverse(routes[row as usize]));
                    let reach = crate::Routes(routes.clone()).reach(widths.len());
                    let y = layer.experts.forward_ordered(isa, &x, &order, &reach).unwrap();
                    let seen = [rounded(&x, types[0]), rounded(&x, types[1])];
                    let what = format!("{} {types:?} {widths:?} × {tokens} {mix}", isa.name());
                    let y = flat(&y);
                    for (t, &route) in routes.iter().enumerate() {
                        let row = |x: &'_ [f64]| x[t * d..][..d].to_vec();
                        let (gate, up) = (row(&seen[0]), row(&seen[1]));
                        let (expected, allowed) = layer.expected([&gate, &up], route, function);
                        assert_close(&y[t * d..][..d], &expected, &allowed, 1.0, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let mut rng = rng();
    let types = [GgmlDType::Q4K; 3];
    let layer = Layer::random(&mut rng, types, &[256, 512, 1024], 512, Activation::Silu);
    for &tokens in few(&[1, 5, 30], 1) {
        let x = random_input(&mut rng, tokens, 512);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            flat(&pool.install(|| layer.experts.forward(&x, &[tokens, tokens, tokens / 2]).unwrap()))
        };
        let alone = run(1);
        assert_eq!(alone, run(2));
        assert_eq!(alone, run(5));
    }
}

#[test]
fn shells_of_other_shapes_are_refused() {
    let zeros = |n, k| {
        Arc::new(PackedMatrix::from_tensor(&Tensor::zeros((n, k), DType::F32, &CPU).unwrap()).unwrap())
    };
    let shell = |n, d| Shell { gate_proj: zeros(n, d), up_proj: zeros(n, d), down_proj: zeros(d, n) };
    let new = |shells, widths: &[usize]| PackedExperts::new(shells, Activation::Silu, widths);
    assert!(new(vec![shell(8, 4), shell(8, 4)], &[8, 16]).is_ok());
    assert!(new(vec![shell(8, 4), shell(8, 4)], &[8, 17]).is_err());
    assert!(new(vec![shell(8, 4), shell(8, 5)], &[8, 16]).is_err());
    assert!(new(vec![shell(8, 4)], &[8, 16]).is_err());
    assert!(new(vec![], &[]).is_err());
    let experts = new(vec![shell(8, 4)], &[8]).unwrap();
    let x = Tensor::zeros((2, 4), DType::F32, &CPU).unwrap();
    assert!(experts.forward(&x, &[2]).is_ok());
    assert!(experts.forward(&x, &[1]).is_err());
    assert!(experts.forward(&x, &[2, 1]).is_err());
    assert!(experts.forward_unsorted(&x, &[0, 2], &[2]).is_err());
}

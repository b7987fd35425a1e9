//! Packed experts of every variant against f64, on fresh random weights and inputs. Memory that is yet to be written
//! holds NaN here.

use candle_core::quantized::GgmlDType;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::cpu::testing::{CPU, SUM, assert_close, few, flat, product, random_input, random_weight, rounded};
use crate::testing::rng;

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
            Projections { gate_proj, up_proj, down_proj }
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
    let shell = |n, d| Projections { gate_proj: zeros(n, d), up_proj: zeros(n, d), down_proj: zeros(d, n) };
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

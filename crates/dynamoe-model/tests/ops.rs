//! Fused operations against their compositions of candle's operations: values and gradients, on fresh random
//! inputs.

use candle_core::{DType, Device, Result, Tensor, Var};
use dynamoe::{HiddenAct, Projections, TrainableFfn};
use dynamoe_model::Params;
use dynamoe_model::ops::{
    AttentionShape, Gradient, Gradients, Norm, Projection, Rotary, RouterWeights, SelfAttention, attention,
    attention_composed, cross_entropy, cross_entropy_composed, embedding, ffn, linear, linear_cross_entropy,
    rms_norm, rms_norm_composed, rope, rope_composed, softcap,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A source of random tensors. A failing test shows its seed; `TEST_SEED=…` repeats a run.
struct Random(ChaCha8Rng);

impl Random {
    fn new() -> Self {
        let seed = match std::env::var("TEST_SEED") {
            Ok(seed) => seed.parse().expect("TEST_SEED must be a whole number"),
            Err(_) => rand::random(),
        };
        println!("seed {seed}");
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    fn normal(&mut self, shape: &[usize], scale: f32) -> Result<Var> {
        let count = shape.iter().product();
        let values = StandardNormal.sample_iter(&mut self.0).take(count).map(|x: f32| scale * x).collect();
        Var::from_vec(values, shape, &Device::Cpu)
    }
}

/// Asserts that two functions of `inputs` agree in value and in every gradient, to `tolerance` of the largest
/// number.
fn assert_same(
    random: &mut Random,
    what: &str,
    inputs: &[&Var],
    fused: impl Fn() -> Result<Tensor>,
    composed: impl Fn() -> Result<Tensor>,
    tolerance: f32,
) -> Result<()> {
    let (a, b) = (fused()?, composed()?);
    assert_close(&format!("{what}: value"), &a, &b, tolerance)?;
    let weights = random.normal(a.dims(), 1.0)?.detach();
    let (a, b) = ((a * &weights)?.sum_all()?.backward()?, (b * &weights)?.sum_all()?.backward()?);
    for (index, input) in inputs.iter().enumerate() {
        let (a, b) = (a.get(input).expect("a gradient"), b.get(input).expect("a gradient"));
        assert_close(&format!("{what}: gradient {index}"), a, b, tolerance)?;
    }
    Ok(())
}

const NORM: Norm = Norm { eps: 1e-5, offset: 0.0 };

/// An attention of one sequence whose heads do not share keys; scores are neither scaled nor capped.
const SHAPE: AttentionShape = AttentionShape {
    sequences: 1,
    positions: 1,
    heads: 1,
    kv_heads: 1,
    head_dim: 2,
    window: None,
    scale: 1.0,
    cap: None,
};

/// Parameters that are made and registered one by one.
struct Weights<'a> {
    random: &'a mut Random,
    params: Params,
}

impl<'a> Weights<'a> {
    fn new(random: &'a mut Random) -> Self {
        Self { random, params: Params::new() }
    }

    fn add(&mut self, shape: &[usize], scale: f32) -> Tensor {
        let name = format!("{:02}", self.params.len());
        let values = self.random.normal(shape, scale).unwrap();
        self.params.insert(&name, &values).unwrap().as_tensor().clone()
    }
}

/// As [`assert_same`], for all of `weights`, with gradients summed by [`Gradients`] over two batches.
fn assert_same_sums(
    weights: &mut Weights<'_>,
    what: &str,
    fused: impl Fn() -> Result<Tensor>,
    composed: impl Fn() -> Result<Tensor>,
    tolerance: f32,
) -> Result<()> {
    let (mut sums, mut expected) = (Gradients::new(), Gradients::new());
    for batch in 0..2 {
        let (a, b) = (fused()?, composed()?);
        assert_close(&format!("{what}: value"), &a, &b, tolerance)?;
        let factors = weights.random.normal(a.dims(), 1.0)?.detach();
        sums.add(&(a * &factors)?.sum_all()?, &weights.params)?;
        // The reference takes the sums that candle makes.
        let store = (b * &factors)?.sum_all()?.backward()?;
        for (name, var) in weights.params.iter() {
            let gradient = store.get(var).unwrap_or_else(|| panic!("{what}: no gradient {name}"));
            let sum = match expected.get(var) {
                Some(Gradient::Device(sum)) => (sum + gradient)?,
                _ => gradient.clone(),
            };
            expected.set(var, Gradient::Device(sum));
        }
        for (name, var) in weights.params.iter() {
            let Some(Gradient::Host(found)) = sums.get(var) else { panic!("{what}: no gradient {name}") };
            let Some(Gradient::Device(sum)) = expected.get(var) else { panic!("{what}: no gradient {name}") };
            let found = Tensor::from_slice(found, var.shape(), &Device::Cpu)?;
            assert_close(&format!("{what}: gradient {name} after batch {batch}"), &found, sum, tolerance)?;
        }
    }
    let (norm, expected) = (sums.norm(&weights.params)?, expected.norm(&weights.params)?);
    assert!((norm - expected).abs() <= 1e-4 * expected, "{what}: norm {norm}, expected {expected}");
    sums.clear();
    assert!(weights.params.iter().all(|(_, var)| sums.get(var).is_none()));
    Ok(())
}

/// Compares with `tolerance` times the largest number.
///
/// A sum of `n` random terms in another order moves by about `√n · 2⁻²⁴` of the largest: 1e-6 for the longest sums here,
/// of some 300 terms. Tests of one sum allow ten times that, since the largest of thousands of differences counts. Where
/// several sums follow one another (FFN, attention), they allow 2e-5 to 5e-5; 1e-4 where scores reach thousands, whose
/// rounding moves probabilities.
fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let (difference, scale) = (largest(&(a - b)?)?, largest(b)?.max(1.0));
    assert!(difference <= tolerance * scale, "{what}: differs by {difference}, largest number {scale}");
    Ok(())
}

#[test]
fn linear_is_a_product_with_the_transposed_weight() -> Result<()> {
    let mut random = Random::new();
    for (n, from, out) in [(1, 1, 1), (3, 5, 2), (1, 64, 48), (33, 7, 65), (257, 64, 172)] {
        let (x, w) = (random.normal(&[n, from], 1.0)?, random.normal(&[out, from], 1.0)?);
        let composed = || x.matmul(&w.t()?);
        assert_same(&mut random, &format!("{n} {from} {out}"), &[&x, &w], || linear(&x, &w), composed, 1e-5)?;
        // A strided input: every other row.
        let wide = random.normal(&[n, 2 * from], 1.0)?;
        let strided = || wide.narrow(1, from, from);
        assert_same(
            &mut random,
            "strided",
            &[&wide, &w],
            || linear(&strided()?, &w),
            || strided()?.contiguous()?.matmul(&w.t()?),
            1e-5,
        )?;
    }
    let (x, w) = (random.normal(&[3, 4], 1.0)?, random.normal(&[3, 5], 1.0)?);
    assert!(linear(&x, &w).is_err());
    Ok(())
}

#[test]
fn rms_norm_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (n, d) in [(1, 1), (1, 8), (5, 31), (3, 64), (1000, 33), (300, 288)] {
        let (x, w) = (random.normal(&[n, d], 2.0)?, random.normal(&[d], 1.0)?);
        for norm in [NORM, Norm { offset: 1.0, ..NORM }] {
            let composed = || rms_norm_composed(&x, &w, norm);
            let what = format!("{n} {d} {norm:?}");
            assert_same(&mut random, &what, &[&x, &w], || rms_norm(&x, &w, norm), composed, 1e-5)?;
        }
    }
    let (x, w) = (random.normal(&[3, 4], 1.0)?, random.normal(&[5], 1.0)?);
    assert!(rms_norm(&x, &w, NORM).is_err());
    Ok(())
}

#[test]
fn rope_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (sequences, positions, heads, d) in [(1, 1, 1, 2), (2, 3, 3, 6), (3, 129, 2, 8), (1, 300, 5, 48)] {
        let angles = random.normal(&[positions, d / 2], 3.0)?.detach();
        let rotary = Rotary { cos: angles.cos()?, sin: angles.sin()? };
        let x = random.normal(&[sequences * positions, heads * d], 1.0)?;
        let what = format!("{sequences} {positions} {heads} {d}");
        assert_same(&mut random, &what, &[&x], || rope(&x, &rotary), || rope_composed(&x, &rotary), 1e-5)?;
        let odd = random.normal(&[sequences * positions, heads * d + 1], 1.0)?;
        assert!(rope(&odd, &rotary).is_err());
    }
    Ok(())
}

#[test]
fn attention_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    let shapes = [
        (1, 1, 1, 1, 2, None, None),
        (2, 1, 4, 2, 8, Some(1), None),
        (1, 7, 3, 1, 6, None, Some(4.0)),
        (2, 31, 4, 4, 4, Some(1), None),
        (2, 32, 4, 2, 8, None, None),
        (2, 33, 4, 2, 8, Some(7), Some(0.5)),
        (1, 100, 2, 1, 48, Some(33), None),
        (3, 130, 6, 3, 16, Some(64), Some(3.0)),
        (1, 65, 8, 4, 10, Some(1000), None),
        (2, 97, 2, 1, 8, Some(3), Some(50.0)),
        (1, 128, 1, 1, 24, Some(33), None),
    ];
    for (sequences, positions, heads, kv_heads, head_dim, window, cap) in shapes {
        let scale = if cap.is_some() { 0.4 } else { (head_dim as f32).powf(-0.5) };
        let shape = AttentionShape { sequences, positions, heads, kv_heads, head_dim, window, scale, cap };
        let n = sequences * positions;
        let q = random.normal(&[n, heads * head_dim], 2.0)?;
        let k = random.normal(&[n, kv_heads * head_dim], 2.0)?;
        let v = random.normal(&[n, kv_heads * head_dim], 1.0)?;
        assert_same(
            &mut random,
            &format!("{shape:?}"),
            &[&q, &k, &v],
            || attention(&q, &k, &v, shape),
            || attention_composed(&q, &k, &v, shape),
            2e-5,
        )?;
    }
    Ok(())
}

#[test]
fn attention_survives_large_scores_and_hides_what_comes_later() -> Result<()> {
    let mut random = Random::new();
    let shape = AttentionShape { positions: 40, head_dim: 4, window: Some(9), scale: 0.5, ..SHAPE };
    let (q, k) = (random.normal(&[40, 4], 60.0)?, random.normal(&[40, 4], 60.0)?);
    let v = random.normal(&[40, 4], 1.0)?;
    let run = |k: &Tensor, v: &Tensor| attention(&q, k, v, shape);
    let all = run(&k, &v)?;
    assert_close("large scores", &all, &attention_composed(&q, &k, &v, shape)?, 1e-4)?;
    // Whatever stands behind position 19 or before 11 cannot reach the query at 19, not even as NaN.
    let nan = Tensor::full(f32::NAN, (11, 4), &Device::Cpu)?;
    let poisoned = |x: &Tensor| {
        Tensor::cat(&[&nan, &x.narrow(0, 11, 9)?, &Tensor::full(f32::NAN, (20, 4), &Device::Cpu)?], 0)
    };
    let seen = run(&poisoned(&k)?, &v)?;
    assert_eq!(seen.get(19)?.to_vec1::<f32>()?, all.get(19)?.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn attention_refuses_shapes_that_do_not_fit() -> Result<()> {
    let shape = AttentionShape { sequences: 2, positions: 3, heads: 3, kv_heads: 2, head_dim: 4, ..SHAPE };
    let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
    let (q, k) = (zeros(6, 12)?, zeros(6, 8)?);
    assert!(attention(&q, &k, &k, shape).is_err());
    let shape = AttentionShape { heads: 4, ..shape };
    assert!(attention(&q, &k, &k, shape).is_err());
    assert!(attention(&zeros(6, 16)?, &k, &k, shape).is_ok());
    assert!(attention(&zeros(6, 16)?, &k, &k, AttentionShape { window: Some(0), ..shape }).is_err());
    Ok(())
}

#[test]
fn cross_entropy_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (n, v) in [(1, 1), (1, 2), (5, 31), (7, 64), (3, 1001), (100, 512)] {
        let logits = random.normal(&[n, v], 5.0)?;
        let targets: Vec<u32> = (0..n).map(|n| (n * 7919 % v) as u32).collect();
        let targets = Tensor::new(targets, &Device::Cpu)?;
        let weights = random.normal(&[n], 1.0)?.detach();
        assert_same(
            &mut random,
            &format!("{n} {v}"),
            &[&logits],
            || cross_entropy(&logits, &targets, &weights),
            || cross_entropy_composed(&logits, &targets, &weights),
            1e-5,
        )?;
    }
    Ok(())
}

#[test]
fn linear_cross_entropy_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (n, d, v) in [(1, 1, 2), (5, 8, 64), (1, 3, 4096), (37, 16, 5000), (64, 24, 8193)] {
        let (x, w) = (random.normal(&[n, d], 1.0)?, random.normal(&[v, d], 1.0)?);
        let targets: Vec<u32> = (0..n).map(|n| (n * 7919 % v) as u32).collect();
        let targets = Tensor::new(targets, &Device::Cpu)?;
        let weights = random.normal(&[n], 1.0)?.detach();
        for cap in [None, Some(4.0)] {
            assert_same(
                &mut random,
                &format!("{n} {d} {v} {cap:?}"),
                &[&x, &w],
                || linear_cross_entropy(&x, &w, &targets, &weights, cap),
                || cross_entropy_composed(&softcap(x.matmul(&w.t()?)?, cap)?, &targets, &weights),
                1e-5,
            )?;
        }
        let outside = Tensor::full(v as u32, n, &Device::Cpu)?;
        assert!(linear_cross_entropy(&x, &w, &outside, &weights, None).is_err());
    }
    Ok(())
}

#[test]
fn cross_entropy_refuses_unknown_tokens_and_keeps_nan() -> Result<()> {
    let (cpu, weights) = (Device::Cpu, Tensor::ones(2, DType::F32, &Device::Cpu)?);
    let targets = Tensor::new(&[0u32, 3], &cpu)?;
    let logits = Tensor::zeros((2, 3), DType::F32, &cpu)?;
    assert!(cross_entropy(&logits, &targets, &weights).is_err());
    let targets = Tensor::new(&[0u32, 2], &cpu)?;
    assert!(cross_entropy(&logits, &targets.to_dtype(DType::I64)?, &weights).is_err());
    let logits = Tensor::new(&[[0f32, f32::NAN, 0.0], [1.0, 2.0, 3.0]], &cpu)?;
    let losses = cross_entropy(&logits, &targets, &weights)?.to_vec1::<f32>()?;
    assert!(losses[0].is_nan() && losses[1].is_finite(), "{losses:?}");
    Ok(())
}

#[test]
fn embedding_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (v, d, n) in [(1, 1, 3), (7, 5, 1), (50, 16, 300)] {
        let table = random.normal(&[v, d], 1.0)?;
        let tokens: Vec<u32> = (0..n).map(|n| (n * 7919 % v) as u32).collect();
        let tokens = Tensor::new(tokens, &Device::Cpu)?;
        let composed = || table.index_select(&tokens, 0);
        assert_same(
            &mut random,
            &format!("{v} {d} {n}"),
            &[&table],
            || embedding(&table, &tokens),
            composed,
            1e-5,
        )?;
        assert!(embedding(&table, &Tensor::new(&[v as u32], &Device::Cpu)?).is_err());
    }
    Ok(())
}

#[test]
fn self_attention_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    let shapes = [
        // sequences, positions, heads, kv_heads, head_dim, window, D, with biases and norms of heads
        (1, 1, 1, 1, 2, None, 3, false),
        (1, 7, 3, 1, 6, None, 8, true),
        (2, 33, 4, 2, 8, Some(7), 16, false),
        (2, 100, 4, 4, 8, None, 32, true),
        (1, 300, 2, 1, 48, Some(130), 24, true),
    ];
    for (sequences, positions, heads, kv_heads, head_dim, window, d, extras) in shapes {
        let (scale, cap) = (0.3, extras.then_some(2.0));
        let shape = AttentionShape { sequences, positions, heads, kv_heads, head_dim, window, scale, cap };
        let angles = random.normal(&[positions, head_dim / 2], 3.0)?.detach();
        let rotary = Rotary { cos: angles.cos()?, sin: angles.sin()? };
        let mut weights = Weights::new(&mut random);
        let x = weights.add(&[sequences * positions, d], 1.0);
        let (q, k) = (heads * head_dim, kv_heads * head_dim);
        let mut projection = |to: usize, from: usize| Projection {
            weight: weights.add(&[to, from], 0.3),
            bias: extras.then(|| weights.add(&[to], 1.0)),
        };
        let [q, k, v, o] = [(q, d), (k, d), (k, d), (d, q)].map(|(to, from)| projection(to, from));
        let [q_norm, k_norm] = [(); 2].map(|()| extras.then(|| weights.add(&[head_dim], 1.0)));
        let norms = Norm { offset: if extras { 1.0 } else { 0.0 }, ..NORM };
        let (norm, residual) = (weights.add(&[d], 1.0), !extras);
        let layer = SelfAttention { norm, q, k, v, o, q_norm, k_norm, norms, residual };
        for rotary in [Some(&rotary), None] {
            assert_same_sums(
                &mut weights,
                &format!("{shape:?}, {}", if rotary.is_some() { "turned" } else { "not turned" }),
                || layer.forward(&x, rotary, shape),
                || layer.forward_composed(&x, rotary, shape),
                5e-5,
            )?;
        }
        // Without Gradients the weights' gradients would be lost.
        let run = |shape| layer.forward(&x, Some(&rotary), shape);
        assert!(run(shape)?.sum_all()?.backward().is_err());
        assert!(run(AttentionShape { heads: heads + 1, ..shape }).is_err());
        assert!(run(AttentionShape { positions: positions + 1, ..shape }).is_err());
    }
    Ok(())
}

#[test]
fn ffn_equals_its_composition() -> Result<()> {
    let mut random = Random::new();
    for (n, d, widths, separate, compensated) in [
        (1, 1, vec![1], 0, false),
        (3, 5, vec![2, 7], 0, true),
        (5, 6, vec![2, 7], 2, false),
        (67, 16, vec![8, 16, 24, 32], 0, false),
        (700, 24, vec![43, 86, 129, 172], 0, true),
        (300, 24, vec![43, 86, 129, 172], 43, true),
        (40, 8, vec![9, 16, 24, 32], 24, true),
    ] {
        let (i, e) = (widths[widths.len() - 1], widths.len());
        let mut weights = Weights::new(&mut random);
        let x = weights.add(&[n, d], 1.0);
        let reach = weights.add(&[n, e], 1.0);
        let layer = TrainableFfn {
            gate_proj: weights.add(&[i, d], 0.5),
            up_proj: weights.add(&[i, d], 0.5),
            down_proj: weights.add(&[d, i], 0.5),
            separate: (separate > 0).then(|| Projections {
                gate_proj: weights.add(&[separate, d], 0.5),
                up_proj: weights.add(&[separate, d], 0.5),
                down_proj: weights.add(&[d, separate], 0.5),
            }),
            compensation: compensated.then(|| weights.add(&[e - 1, d], 1.0)),
            widths,
            hidden_act: if compensated { HiddenAct::GeluTanh } else { HiddenAct::Silu },
        };
        assert_same_sums(
            &mut weights,
            &format!("{n} {d} {i}, {separate} separate"),
            || ffn(&layer, &x, &reach),
            || layer.forward(&x, &reach),
            3e-5,
        )?;
        assert!(ffn(&layer, &x, &reach)?.sum_all()?.backward().is_err());
        assert!(ffn(&layer, &x.narrow(1, 0, d)?, &reach.narrow(0, 0, n - 1)?).is_err());
    }
    Ok(())
}

#[test]
fn router_logits_equal_their_composition() -> Result<()> {
    let mut random = Random::new();
    for (n, d, r, narrower) in [(1, 1, 1, 1), (5, 7, 3, 2), (300, 64, 32, 3)] {
        let mut weights = Weights::new(&mut random);
        let x = weights.add(&[n, d], 1.0);
        let fc1 = [weights.add(&[r, d], 0.5), weights.add(&[r], 1.0)];
        let router =
            RouterWeights { fc1, fc2: [weights.add(&[narrower, r], 0.5), weights.add(&[narrower], 1.0)] };
        let what = format!("{n} {d} {r} {narrower}");
        assert_same_sums(&mut weights, &what, || router.logits(&x), || router.logits_composed(&x), 1e-5)?;
        assert!(router.logits(&x).and_then(|l| l.sum_all()?.backward()).is_err());
    }
    Ok(())
}

#[test]
fn gradients_repeat_bit_for_bit() -> Result<()> {
    let mut random = Random::new();
    let shape = AttentionShape { sequences: 3, positions: 70, heads: 4, kv_heads: 2, head_dim: 8, ..SHAPE };
    let (q, w) = (random.normal(&[210, 32], 1.0)?, random.normal(&[32], 1.0)?);
    let kv = random.normal(&[16, 32], 1.0)?;
    let run = || -> Result<Vec<Vec<f32>>> {
        let x = rms_norm(&q, &w, NORM)?;
        let kv = linear(&x, &kv)?;
        let loss = attention(&x, &kv, &kv, shape)?.sqr()?.sum_all()?;
        let gradients = loss.backward()?;
        [&q, &w].iter().map(|x| gradients.get(x).expect("a gradient").flatten_all()?.to_vec1()).collect()
    };
    let first = run()?;
    for _ in 0..5 {
        assert!(run()? == first, "another run gave other bits");
    }
    Ok(())
}

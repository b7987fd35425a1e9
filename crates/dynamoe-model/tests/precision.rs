//! Operations with matrix products in bf16, which is a setting of the whole process, against those composed in f32.

use candle_core::{DType, Device, Result, Tensor, Var};
use dynamoe::{HiddenAct, TrainableFfn};
use dynamoe_model::Params;
use dynamoe_model::ops::{
    AttentionShape, Gradient, Gradients, Norm, Precision, Projection, SelfAttention, composed, ffn, linear,
    linear_cross_entropy, reach_of,
};

fn random(shape: (usize, usize), size: f32) -> Tensor {
    Tensor::randn(0f32, size, shape, &Device::Cpu).unwrap()
}

/// `|a - b| / |b|` over all numbers.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// What `run` puts out, and the gradients of a weighted sum of that with respect to `params`.
fn outputs(params: &Params, weights: &Tensor, run: &dyn Fn() -> Result<Tensor>) -> Vec<Vec<f32>> {
    let y = run().unwrap();
    let loss = (&y * weights).unwrap().sum_all().unwrap();
    let mut gradients = Gradients::new();
    gradients.add(&loss, params).unwrap();
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let gradient = |var: &Var| match gradients.get(var).expect("a gradient") {
        Gradient::Host(values) => values.clone(),
        Gradient::Device(tensor) => values(tensor),
    };
    let mut all = vec![values(&y)];
    all.extend(params.iter().map(|(_, var)| gradient(var)));
    all
}

/// Compares bf16 with f32, which must differ, but by no more than rounding does.
fn check(name: &str, params: &Params, weights: &Tensor, run: &dyn Fn() -> Result<Tensor>) {
    Precision::F32.set().unwrap();
    let expected = composed(|| outputs(params, weights, run));
    let exact = outputs(params, weights, run);
    Precision::Bf16.set().unwrap();
    let found = outputs(params, weights, run);
    for (part, ((found, exact), expected)) in found.iter().zip(&exact).zip(&expected).enumerate() {
        let [rounded, exact] = [found, exact].map(|values| difference(values, expected));
        assert!(exact < 1e-5, "{name}, part {part}: f32 is off by {exact}");
        assert!((1e-5..2e-2).contains(&rounded), "{name}, part {part}: bf16 is off by {rounded}");
    }
}

#[test]
fn operations_in_bf16_are_those_in_f32_but_for_rounding() {
    if let Err(error) = Precision::Bf16.set() {
        println!("not run: {error}");
        return;
    }
    let (n, d, i, v) = (96, 64, 160, 5000);
    let mut params = Params::new();
    let x = params.insert("x", &random((n, d), 1.0)).unwrap();
    let w = params.insert("w", &random((i, d), 0.2)).unwrap();
    check("linear", &params, &random((n, i), 1.0), &|| linear(&x, &w));

    let mut params = Params::new();
    let x = params.insert("x", &random((n, d), 1.0)).unwrap();
    let mut weight = |name, shape| params.insert(name, &random(shape, 0.2)).unwrap().as_tensor().clone();
    let weights = TrainableFfn {
        gate_proj: weight("gate", (i, d)),
        up_proj: weight("up", (i, d)),
        down_proj: weight("down", (d, i)),
        separate: None,
        compensation: None,
        widths: vec![i / 2, i],
        hidden_act: HiddenAct::Silu,
    };
    let chosen: Vec<usize> = (0..n).map(|row| row % 2).collect();
    let reach = reach_of(&chosen, 2, &Device::Cpu).unwrap();
    check("ffn", &params, &random((n, d), 1.0), &|| ffn(&weights, &x, &reach));

    for v in [v, 300] {
        let mut params = Params::new();
        let x = params.insert("x", &random((n, d), 1.0)).unwrap();
        let w = params.insert("w", &random((v, d), 0.2)).unwrap();
        let targets: Vec<u32> = (0..n).map(|row| (row * 7 % v) as u32).collect();
        let targets = Tensor::new(targets, &Device::Cpu).unwrap();
        let ones = Tensor::ones(n, DType::F32, &Device::Cpu).unwrap();
        check("loss", &params, &ones, &|| linear_cross_entropy(&x, &w, &targets, &ones, None));
    }

    let mut params = Params::new();
    let x = params.insert("x", &random((n, d), 1.0)).unwrap();
    let mut weight = |name, shape| Projection {
        weight: params.insert(name, &random(shape, 0.2)).unwrap().as_tensor().clone(),
        bias: None,
    };
    let layer = SelfAttention {
        q: weight("q", (64, d)),
        k: weight("k", (32, d)),
        v: weight("v", (32, d)),
        o: weight("o", (d, 64)),
        q_norm: None,
        k_norm: None,
        norm: Tensor::ones(d, DType::F32, &Device::Cpu).unwrap(),
        norms: Norm { eps: 1e-5, offset: 0.0 },
        residual: false,
    };
    let shape = AttentionShape {
        sequences: 2,
        positions: n / 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        window: None,
        scale: 0.25,
        cap: None,
    };
    check("attention", &params, &random((n, d), 1.0), &|| layer.forward(&x, None, shape));
}

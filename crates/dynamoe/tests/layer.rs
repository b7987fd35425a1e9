//! The layer's invariants, and its fast paths against the reference, on fresh random inputs.

mod support;

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, Linear, Module, VarBuilder};
use dynamoe::cpu::PackedMatrix;
use dynamoe::reference::{ReferenceFfn, ReferenceLinear};
use dynamoe::{
    DynaMoeConfig, DynaMoeFfn, HiddenAct, NestedExperts, PackedExperts, PrefixExperts, Projections, Router,
    Routes, ShellExperts, TrainableFfn, tensors,
};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const CPU: Device = Device::Cpu;

/// A layer's weights, once as tensors and once as the reference.
struct Layer {
    act: HiddenAct,
    d: usize,
    widths: Vec<usize>,
    dense: Projections<Tensor>,
    fc1: Linear,
    fc2: Linear,
    compensation: Tensor,
    /// The smaller experts' separate weights.
    separate: Option<Projections<Tensor>>,
}

fn random(rng: &mut ChaCha8Rng, rows: usize, columns: usize, scale: f32) -> Tensor {
    support::uniform(rng, scale, (rows, columns))
}

/// gate and up `(i, d)`, down `(d, i)`.
fn matrices(rng: &mut ChaCha8Rng, i: usize, d: usize) -> Projections<Tensor> {
    Projections {
        gate_proj: random(rng, i, d, 1.0),
        up_proj: random(rng, i, d, 1.0),
        down_proj: random(rng, d, i, 1.0),
    }
}

impl Layer {
    fn random(rng: &mut ChaCha8Rng, d: usize, widths: &[usize]) -> Self {
        let (i, narrower, r) = (widths[widths.len() - 1], widths.len() - 1, 5);
        let bias = |rng: &mut ChaCha8Rng, n| random(rng, 1, n, 1.0).squeeze(0).unwrap();
        Self {
            act: HiddenAct::ALL[rng.random_range(0..HiddenAct::ALL.len())],
            d,
            widths: widths.to_vec(),
            dense: matrices(rng, i, d),
            fc1: Linear::new(random(rng, r, d, 1.0), Some(bias(rng, r))),
            fc2: Linear::new(random(rng, narrower, r, 1.5), Some(bias(rng, narrower))),
            compensation: random(rng, narrower, d, 1.0),
            separate: None,
        }
    }

    /// The same with separate weights for this many shells.
    fn with_separate(self, rng: &mut ChaCha8Rng, shells: usize) -> Self {
        let (p, d) = (shells.checked_sub(1).map_or(0, |last| self.widths[last]), self.d);
        Self { separate: (p > 0).then(|| matrices(rng, p, d)), ..self }
    }

    fn router(&self) -> Router {
        Router::Mlp { fc1: self.fc1.clone(), fc2: self.fc2.clone() }
    }

    fn prefixes(&self, dtype: DType) -> PrefixExperts {
        let cast = |part: &Projections<Tensor>| part.as_ref().map(|t| t.to_dtype(dtype).unwrap());
        let experts = PrefixExperts::new(cast(&self.dense), self.act.into(), &self.widths).unwrap();
        match &self.separate {
            Some(separate) => experts.with_separate(&cast(separate)).unwrap(),
            None => experts,
        }
    }

    fn shells(&self, dtype: DType) -> ShellExperts<Linear> {
        let cut = |part: &Projections<Tensor>| {
            let mut start = 0;
            let widths = self.widths.iter().filter(|&&end| end <= part.gate_proj.dim(0).unwrap());
            let shells = widths.map(|&end| {
                let cut = |w: &Tensor, dim| {
                    let shell = w.narrow(dim, start, end - start).unwrap().contiguous().unwrap();
                    Linear::new(shell.to_dtype(dtype).unwrap(), None)
                };
                let shell = Projections {
                    gate_proj: cut(&part.gate_proj, 0),
                    up_proj: cut(&part.up_proj, 0),
                    down_proj: cut(&part.down_proj, 1),
                };
                start = end;
                shell
            });
            shells.collect::<Vec<_>>()
        };
        let separate = self.separate.as_ref().map_or(Vec::new(), cut);
        let experts = ShellExperts::new(cut(&self.dense), self.act.into(), &self.widths).unwrap();
        experts.with_separate(separate).unwrap()
    }

    fn packed(&self) -> PackedExperts {
        let pack = |l: &Linear| Arc::new(PackedMatrix::from_tensor(l.weight()).unwrap());
        let all = |shells: &[Projections<Linear>]| -> Vec<_> {
            shells.iter().map(|shell| shell.as_ref().map(pack)).collect()
        };
        let shells = self.shells(DType::F32);
        let experts = PackedExperts::new(all(shells.shells()), self.act.into(), &self.widths).unwrap();
        experts.with_separate(all(shells.separate())).unwrap()
    }

    fn ffn<X: NestedExperts>(&self, experts: X, sensitivity: f64) -> DynaMoeFfn<X> {
        DynaMoeFfn::new(experts, self.router(), Some(self.compensation.clone()), sensitivity).unwrap()
    }

    fn reference(&self) -> ReferenceFfn {
        let rows = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let row = |t: Option<&Tensor>| t.unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        let linear = |l: &Linear| ReferenceLinear { weight: rows(l.weight()), bias: row(l.bias()) };
        ReferenceFfn {
            hidden_act: self.act,
            gate_proj: rows(&self.dense.gate_proj),
            up_proj: rows(&self.dense.up_proj),
            down_proj: rows(&self.dense.down_proj),
            fc1: linear(&self.fc1),
            fc2: linear(&self.fc2),
            compensation: rows(&self.compensation),
            separate: match &self.separate {
                Some(separate) => separate.as_ref().into_array().map(rows),
                None => [const { Vec::new() }; 3],
            },
            widths: self.widths.clone(),
        }
    }

    fn dense(&self, x: &Tensor) -> Tensor {
        let [gate, up, down] = self.dense.as_ref().into_array().map(|w| w.t().unwrap());
        let (gate, up) = (x.matmul(&gate).unwrap(), x.matmul(&up).unwrap());
        let h = (Activation::from(self.act).forward(&gate).unwrap() * up).unwrap();
        h.matmul(&down).unwrap()
    }
}

fn routed<X: NestedExperts>(ffn: &DynaMoeFfn<X>, x: &Tensor, dials: &[f64]) -> (Tensor, Routes) {
    let (y, routes) = ffn.forward_routed(x, dials).unwrap();
    (y, routes.wait().unwrap())
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Compares with `tolerance · (1 + |expected|)`.
///
/// An output is a sum of at most 65 products, of size 10 or less. f32 moves a sum by about 2⁻²⁴ of its terms' sizes: 4e-5
/// together. Tests allow 1e-4, or 1e-5 where sums are four times as short. In f64 1e-9 allows no step in f32. In f16 one
/// rounding is 2⁻¹¹, of terms whose sizes add up to some 16: 8e-3, and 2e-2 is allowed.
fn assert_close(found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = flat(found);
    assert_eq!(found.len(), expected.len());
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "at {at}: found {a}, expected {b}");
    }
}

/// Expected outputs; tokens whose score is within rounding of the dial take the route that was found.
fn expected(layer: &Layer, x: &Tensor, sensitivity: f64, found: &Routes) -> Vec<f64> {
    let reference = layer.reference();
    let tokens = x.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    assert_eq!(found.0.len(), tokens.len());
    let mut y = Vec::new();
    for (token, &expert) in tokens.iter().zip(&found.0) {
        let near = reference.scores(token).iter().any(|score| (score - sensitivity).abs() < 1e-5);
        assert!(near || reference.route(token, sensitivity) == expert, "routed to {expert}");
        y.extend(reference.expert(token, expert));
    }
    y
}

/// `x (T, D)` that is a window of a larger tensor filled with NaN: reading outside of it shows.
fn poisoned(x: &Tensor) -> Tensor {
    let (t, d) = x.dims2().unwrap();
    let rows = Tensor::full(f32::NAN, (1, d), &CPU).unwrap();
    let x = Tensor::cat(&[&rows, x, &rows], 0).unwrap();
    let columns = Tensor::full(f32::NAN, (t + 2, 2), &CPU).unwrap();
    Tensor::cat(&[&x, &columns], 1).unwrap().narrow(0, 1, t).unwrap().narrow(1, 0, d).unwrap()
}

#[test]
fn fast_paths_equal_the_reference() {
    let mut rng = support::rng();
    let shapes = [vec![7], vec![1, 2, 9], vec![8, 16, 24, 32], vec![5, 64, 65]];
    let cases = shapes.iter().flat_map(|widths| (0..widths.len()).map(move |separate| (widths, separate)));
    for (widths, separate) in cases {
        for tokens in [0, 1, 2, 7, 64] {
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 1e-9)] {
                let layer = Layer::random(&mut rng, 6, widths).with_separate(&mut rng, separate);
                let x = random(&mut rng, tokens, layer.d, 2.0);
                for sensitivity in [0.0, 0.3, 0.5, 0.9, 1.0] {
                    let strided = poisoned(&x).to_dtype(dtype).unwrap();
                    let (y, routes) =
                        routed(&layer.ffn(layer.prefixes(dtype), 1.0), &strided, &[sensitivity]);
                    assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype));
                    let expected = expected(&layer, &x, sensitivity, &routes);
                    assert_close(&y, &expected, tolerance);
                    if dtype == DType::F32 {
                        let packed = layer.ffn(layer.packed(), 1.0);
                        assert_close(&packed.forward_with(&strided, &routes).unwrap(), &expected, tolerance);
                    }
                    let shells = layer.ffn(layer.shells(dtype), 1.0);
                    let strided = poisoned(&x).to_dtype(dtype).unwrap().contiguous().unwrap();
                    assert_close(&shells.forward_with(&strided, &routes).unwrap(), &expected, tolerance);
                }
            }
        }
    }
}

#[test]
fn half_precision_follows_the_reference() {
    let mut rng = support::rng();
    let mut layer = Layer::random(&mut rng, 8, &[8, 16, 32]);
    layer.dense = layer.dense.map(|w| w.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap());
    let x = random(&mut rng, 9, 8, 1.0).to_dtype(DType::F16).unwrap();
    let (y, routes) = routed(&layer.ffn(layer.prefixes(DType::F16), 0.5), &x, &[0.5]);
    assert_eq!(y.dtype(), DType::F16);
    assert_close(&y, &expected(&layer, &x, 0.5, &routes), 2e-2);
}

#[test]
fn the_top_of_the_dial_is_the_dense_path_bit_for_bit() {
    let mut rng = support::rng();
    let mut layer = Layer::random(&mut rng, 16, &[16, 32, 48]).with_separate(&mut rng, 1);
    // a router that would poison everything it touches must not run
    let nan = Tensor::full(f32::NAN, layer.fc1.weight().shape(), &CPU).unwrap();
    layer.fc1 = Linear::new(nan, layer.fc1.bias().cloned());
    for tokens in [1, 5] {
        let x = random(&mut rng, tokens, layer.d, 1.0);
        let y = layer.ffn(layer.prefixes(DType::F32), 1.0).forward(&x.unsqueeze(0).unwrap()).unwrap();
        assert_eq!(flat(&y), flat(&layer.dense(&x)));
    }
}

#[test]
fn each_token_may_have_its_own_dial() {
    let mut rng = support::rng();
    let layer = Layer::random(&mut rng, 6, &[8, 16, 24, 32]).with_separate(&mut rng, 1);
    let ffn = layer.ffn(layer.prefixes(DType::F32), 1.0);
    let x = random(&mut rng, 20, layer.d, 2.0);
    let dials: Vec<f64> = (0..20).map(|_| rng.random_range(0.0..=1.0)).collect();
    let (y, routes) = routed(&ffn, &x, &dials);
    for (t, &dial) in dials.iter().enumerate() {
        let (alone, route) = routed(&ffn, &x.narrow(0, t, 1).unwrap(), &[dial]);
        assert_eq!(route.0, [routes.0[t]]);
        assert_close(&y.narrow(0, t, 1).unwrap(), &flat(&alone), 1e-5);
    }
    let says = |result: Result<(), String>, words: &str| {
        let error = result.unwrap_err();
        assert!(error.contains(words), "{words:?} not in: {error}");
    };
    let error = |error: candle_core::Error| error.to_string();
    says(ffn.forward_routed(&x, &dials[..3]).map(drop).map_err(error), "3");
    says(ffn.forward_with(&x, &Routes(vec![4; 20])).map(drop).map_err(error), "expected 20 experts below 4");
    for wrong in [f64::NAN, 1.1] {
        says(ffn.set_sensitivity(wrong).map_err(|error| error.to_string()), &format!("{wrong}"));
    }
}

#[test]
fn the_differentiable_forward_yields_every_expert() {
    let mut rng = support::rng();
    for separate in [0, 1, 2] {
        let layer = Layer::random(&mut rng, 6, &[3, 8, 20]).with_separate(&mut rng, separate);
        let train = TrainableFfn {
            gate_proj: layer.dense.gate_proj.clone(),
            up_proj: layer.dense.up_proj.clone(),
            down_proj: layer.dense.down_proj.clone(),
            separate: layer.separate.clone(),
            compensation: Some(layer.compensation.clone()),
            widths: layer.widths.clone(),
            hidden_act: layer.act,
        };
        let x = random(&mut rng, 11, layer.d, 1.0);
        let outputs = train.expert_outputs(&x).unwrap();
        let ffn = layer.ffn(layer.prefixes(DType::F32), 1.0);
        for (e, output) in outputs.iter().enumerate() {
            assert_close(output, &flat(&ffn.forward_with(&x, &Routes(vec![e; 11])).unwrap()), 1e-5);
        }
        // a mixture of experts is the mixture of their outputs
        let p = candle_nn::ops::softmax(&random(&mut rng, 11, 3, 2.0), 1).unwrap();
        let column = |e: usize| p.narrow(1, e, 1).unwrap();
        let tail = (column(1) + column(2)).unwrap();
        let reach = Tensor::cat(&[&(column(0) + &tail).unwrap(), &tail, &column(2)], 1).unwrap();
        let mut mixture = x.zeros_like().unwrap();
        for (e, output) in outputs.iter().enumerate() {
            mixture = (mixture + output.broadcast_mul(&column(e)).unwrap()).unwrap();
        }
        assert_close(&train.forward(&x, &reach).unwrap(), &flat(&mixture), 1e-5);
    }
}

#[test]
fn separate_weights_are_for_as_many_neurons_as_a_smaller_expert_has() {
    let mut rng = support::rng();
    let layer = Layer::random(&mut rng, 6, &[3, 8, 20]);
    for p in [0, 2, 4, 20] {
        let separate = matrices(&mut rng, p, 6);
        let error = layer.prefixes(DType::F32).with_separate(&separate).unwrap_err().to_string();
        assert!(error.contains("[3, 8]") && error.contains(&format!("found {p}")), "{error}");
    }
    let (shells, packed) = (layer.shells(DType::F32), layer.packed());
    assert!(packed.clone().with_separate(packed.shells().to_vec()).is_err());
    assert!(shells.clone().with_separate(shells.shells().to_vec()).is_err());
    packed.clone().with_separate(packed.shells()[..2].to_vec()).unwrap();
}

/// Tensors under their names in a checkpoint, and what config.json says of them.
#[test]
fn a_layer_is_read_from_a_checkpoint() {
    let mut rng = support::rng();
    for separate in [0, 2] {
        let layer = Layer::random(&mut rng, 6, &[4, 8, 12, 16]).with_separate(&mut rng, separate);
        let json = serde_json::json!({ "intermediate_size": 16, "num_hidden_layers": 4, "dynamoe": {
            "version": 3, "hidden_act": layer.act, "base_architecture": "LlamaForCausalLM", "base_model_type": "llama",
            "expert_widths": layer.widths, "own_shells": separate, "sensitivity": 0.5,
            "router": { "kind": "mlp", "hidden_size": 5, "compensation": true },
        }});
        let config = DynaMoeConfig::from_config_json(&json).unwrap();
        let router = [&layer.fc1, &layer.fc2].map(|l| [l.weight().clone(), l.bias().unwrap().clone()]);
        let mut named: Vec<(String, Tensor)> = Vec::new();
        let mut add = |(name, shape): tensors::NamedShape, tensor: Tensor| {
            assert_eq!(tensor.dims(), shape, "{name}");
            named.push((tensors::full_name(3, name), tensor));
        };
        tensors::dense(16, 6)
            .into_array()
            .into_iter()
            .zip(layer.dense.clone().into_array())
            .for_each(|(n, t)| add(n, t));
        if let (Some(table), Some(part)) = (tensors::separate(&config, 6), layer.separate.clone()) {
            table.into_array().into_iter().zip(part.into_array()).for_each(|(n, t)| add(n, t));
        }
        tensors::router(&config, 6)
            .unwrap()
            .into_iter()
            .zip(router.into_iter().flatten())
            .for_each(|(n, t)| add(n, t));
        add(tensors::compensation(&config, 6).unwrap(), layer.compensation.clone());

        let load = |named: &[(String, Tensor)], dtype| {
            let vb = VarBuilder::from_tensors(named.iter().cloned().collect::<HashMap<_, _>>(), dtype, &CPU);
            DynaMoeFfn::load(&config, 6, vb.pp("model.layers.3.mlp"))
        };
        let ffn = load(&named, DType::F32).unwrap();
        let x = random(&mut rng, 20, 6, 2.0);
        let expected = layer.ffn(layer.prefixes(DType::F32), 0.5);
        assert_eq!(flat(&ffn.forward(&x).unwrap()), flat(&expected.forward(&x).unwrap()));
        // the router is read exactly, whatever the type of the matrices
        let half = load(&named, DType::F16).unwrap();
        assert_eq!(half.route(&x, &[0.5]).unwrap(), expected.route(&x, &[0.5]).unwrap());

        for missing in 0..named.len() {
            let mut named = named.clone();
            let (name, tensor) = named.remove(missing);
            assert!(load(&named, DType::F32).unwrap_err().to_string().contains(&name), "{name}");
            named.push((name.clone(), Tensor::cat(&[&tensor, &tensor], 0).unwrap()));
            assert!(load(&named, DType::F32).unwrap_err().to_string().contains("shape"), "{name}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn reordering_neurons_changes_nothing(seed: u64, d in 1usize..9, i in 1usize..40) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let layer = Layer::random(&mut rng, d, &[i]);
        let mut order: Vec<u32> = (0..i as u32).collect();
        order.shuffle(&mut rng);
        let order = Tensor::new(order, &CPU).unwrap();
        let cut = |t: &Tensor, dim| t.index_select(&order, dim).unwrap();
        let Projections { gate_proj, up_proj, down_proj } = &layer.dense;
        let reordered = Projections {
            gate_proj: cut(gate_proj, 0),
            up_proj: cut(up_proj, 0),
            down_proj: cut(down_proj, 1),
        };
        let reordered =
            PrefixExperts::new(reordered, layer.act.into(), &[i]).unwrap();
        let x = random(&mut rng, 4, d, 1.0);
        assert_close(&reordered.expert(&x, 0).unwrap(), &flat(&layer.dense(&x)), 1e-4);
    }

    #[test]
    fn a_larger_sensitivity_never_narrows_a_token(seed: u64, a in 0f64..=1.0, b in 0f64..=1.0) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let layer = Layer::random(&mut rng, 4, &[2, 4, 6, 8, 10]);
        let ffn = layer.ffn(layer.prefixes(DType::F32), 1.0);
        let x = random(&mut rng, 16, 4, 3.0);
        let low = routed(&ffn, &x, &[a.min(b)]).1;
        let high = routed(&ffn, &x, &[a.max(b)]).1;
        prop_assert!(low.0.iter().zip(&high.0).all(|(l, h)| l <= h));
        prop_assert!(low.mean_width(&layer.widths) <= high.mean_width(&layer.widths));
    }

    #[test]
    fn even_widths_always_nest(i in 1usize..40_000, experts in 1usize..33) {
        match dynamoe::config::even_widths(i, experts) {
            Ok(widths) => {
                prop_assert_eq!(widths.len(), experts);
                prop_assert!(dynamoe::config::check_widths(&widths, i).is_ok());
            }
            Err(_) => prop_assert!(experts > i),
        }
    }
}

#[test]
fn widths_follow_the_paper_in_blocks() {
    let widths = |i, e| dynamoe::config::even_widths(i, e).unwrap();
    assert_eq!(widths(14336, 4), [3584, 7168, 10752, 14336]);
    assert_eq!(widths(8192, 4), [2048, 4096, 6144, 8192]);
    assert_eq!(widths(11008, 4), [2816, 5632, 8448, 11008]);
    assert_eq!(widths(172, 4), [43, 86, 129, 172]);
    assert_eq!(widths(192, 4), [48, 96, 144, 192]);
    assert_eq!(widths(512, 4), [128, 256, 384, 512]);
}

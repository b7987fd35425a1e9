//! A training step as a whole.

mod support;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use dynamoe::{DynaMoeConfig, HiddenAct, Projections, RouterConfig, RouterKind, TrainableFfn, tensors};
use dynamoe_model::config::{Architecture, ModelConfig, Scales};
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::{self, Gradient, Gradients};
use moefy_train::methods::Method;
use moefy_train::train::{StepBatch, StepContext, StepLoss, Teacher, TrainConfig, TrainModel, Trained};
use rand::Rng;
use support::random::normal;

/// A model that uses what the architectures differ in.
fn config(vocab_size: usize, extras: bool, separate_shells: usize) -> ModelConfig {
    let hidden_act = if extras { HiddenAct::GeluTanh } else { HiddenAct::Silu };
    let factors = Scales {
        embedding: 4.0,
        attention: 0.2,
        residual: 0.7,
        logits: 0.8,
        attention_cap: Some(2.0),
        logit_cap: Some(3.0),
    };
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: None,
        local_rope_theta: extras.then_some(100.0),
        tie_word_embeddings: !extras,
        qkv_bias: extras,
        o_bias: extras,
        mlp_bias: false,
        qk_norm: extras,
        norm_offset: if extras { 1.0 } else { 0.0 },
        output_norms: extras,
        hidden_act,
        scales: if extras { factors } else { Scales::plain(8) },
        rotary_layers: vec![true, !extras],
        sliding_window: if extras { vec![Some(5), None] } else { vec![None; 2] },
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        closing_token_id: None,
        dynamoe: Some(DynaMoeConfig {
            version: dynamoe::config::version_for(separate_shells, hidden_act),
            base_architecture: "LlamaForCausalLM".into(),
            base_model_type: "llama".into(),
            hidden_act,
            expert_widths: vec![8, 24, 40],
            separate_shells,
            router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 6, compensation: true },
            sensitivity: 0.5,
            budgets: Vec::new(),
        }),
    }
}

/// Hands out random tensors, the same ones for the same names.
fn random() -> impl FnMut(&str, &[usize]) -> anyhow::Result<Tensor> {
    let (mut rng, mut made) = (support::random::rng(), BTreeMap::new());
    move |name: &str, shape: &[usize]| {
        let new = || normal(&mut rng, 0.3, shape);
        Ok(made.entry(name.to_owned()).or_insert_with(new).clone())
    }
}

/// One batch through a model, and its gradients.
fn step(model: &TrainModel, train: &TrainConfig) -> (StepLoss, Gradients) {
    let vocab_size = model.config().vocab_size;
    let batch = |shift: u32| {
        let tokens: Vec<u32> = (0..66u32).map(|n| (n + shift) * 7919 % vocab_size as u32).collect();
        Tensor::from_vec(tokens, (3, 22), &Device::Cpu).unwrap()
    };
    let objective = train.method.objective(&train.routing(vec![0.2, 0.6, 1.0]));
    let teacher = train.has_teacher().then_some(Teacher::Itself);
    let weights = Tensor::ones((3, 22), candle_core::DType::F32, &Device::Cpu).unwrap();
    let batch = StepBatch { tokens: batch(0), targets: batch(1), weights, counted: 66.0 };
    let objective = objective.as_ref();
    let context = StepContext { objective, teacher, config: train, step: 3, micro: 0 };
    let mut gradients = Gradients::new();
    let loss = model.accumulate(&batch, &context, &mut gradients).unwrap();
    (loss, gradients)
}

/// Checks that two models took the same step.
fn assert_same(case: &str, [(one, a), (other, b)]: [(&TrainModel, (StepLoss, Gradients)); 2]) {
    let ((a, gradients), (b, others)) = (a, b);
    assert!((a.objective - b.objective).abs() < 1e-5 * b.objective.abs(), "{case}: loss {a:?}, {b:?}");
    assert_eq!((&a.widths, &a.dials), (&b.widths, &b.dials), "{case}");
    for ((name, var), (_, twin)) in one.params().iter().zip(other.params().iter()) {
        let values = |gradients: &Gradients, var: &Var| match gradients.get(var) {
            Some(Gradient::Host(values)) => values.clone(),
            found => panic!("{case}, {name}: {found:?}"),
        };
        let (a, b) = (values(&gradients, var), values(&others, twin));
        let scale = b.iter().fold(1e-3f32, |max, x| max.max(x.abs()));
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 2e-4 * scale, "{case}, {name}: {a}, {b}, largest {scale}");
        }
    }
}

const SHAPES: [(usize, bool, usize); 3] = [(50, false, 0), (50, true, 1), (4100, true, 2)];
const METHODS: [Method; 4] = [Method::Dense, Method::Static, Method::Priced, Method::Similarity];

/// Another device has no fused operations, but computes the same.
#[test]
fn a_step_without_fused_operations_is_the_same_step() {
    for (vocab_size, extras, separate_shells) in SHAPES {
        for method in METHODS {
            let train = TrainConfig { method, ..TrainConfig::default() };
            let (config, mut random) = (config(vocab_size, extras, separate_shells), random());
            let [one, other] = [(); 2].map(|()| TrainModel::new(&config, &train, &mut random).unwrap());
            let steps = [(&one, step(&one, &train)), (&other, ops::composed(|| step(&other, &train)))];
            assert_same(&format!("{method:?}"), steps);
        }
    }
}

#[test]
fn layers_that_are_computed_again_make_the_same_step() {
    // the logits of the last one are computed in two blocks
    for (vocab_size, extras, separate_shells) in SHAPES.into_iter().chain([(140_000, false, 1)]) {
        for (method, trained, distill) in [
            (Method::Dense, Trained::All, 0.0),
            (Method::Static, Trained::All, 0.5),
            (Method::Priced, Trained::All, 1.0),
            (Method::Priced, Trained::Added, 1.0),
            (Method::Priced, Trained::Added, 0.0),
            (Method::Similarity, Trained::Routers, 1.0),
        ] {
            let train = TrainConfig { method, train: trained, distill, ..TrainConfig::default() };
            let again = TrainConfig { recompute: true, ..train.clone() };
            let (config, mut random) = (config(vocab_size, extras, separate_shells), random());
            let model = TrainModel::new(&config, &train, &mut random).unwrap();
            let steps = [&again, &train].map(|train| (&model, step(&model, train)));
            assert_same(&format!("{vocab_size}, {method:?}, {trained:?}"), steps);
        }
    }
}

/// candle computes gradients of all matrices that it multiplies with something trained, also of those that are not.
#[test]
fn frozen_matrices_get_no_gradient_on_any_device() {
    let (config, mut random) = (config(50, true, 1), random());
    let mut frozen = BTreeMap::new();
    let mut get = |name: &str, shape: &[usize]| {
        let tensor = random(name, shape)?;
        frozen.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    };
    let backbone = Backbone::from_tensors(&config, &mut get).unwrap();
    let mut matrix = |name: &str, shape: [usize; 2]| get(&tensors::full_name(0, name), &shape).unwrap();
    let weights = TrainableFfn {
        gate_proj: matrix(tensors::GATE_PROJ, [40, 24]),
        up_proj: matrix(tensors::UP_PROJ, [40, 24]),
        down_proj: matrix(tensors::DOWN_PROJ, [24, 40]),
        separate: Some(Projections {
            gate_proj: matrix(tensors::SEPARATE_GATE_PROJ, [8, 24]),
            up_proj: matrix(tensors::SEPARATE_UP_PROJ, [8, 24]),
            down_proj: matrix(tensors::SEPARATE_DOWN_PROJ, [24, 8]),
        }),
        compensation: None,
        widths: config.expert_widths(),
        hidden_act: config.hidden_act,
    };
    let tokens = Tensor::zeros((2, 5), candle_core::DType::U32, &Device::Cpu).unwrap();
    let pass = || {
        let x = Var::from_tensor(&normal(&mut support::random::rng(), 1.0, (10, 24))).unwrap();
        let reach = Var::ones((10, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let places = backbone.places(&tokens).unwrap();
        let y = backbone.layer(0, &x, &places, &mut |x| ops::ffn(&weights, x, &reach)).unwrap();
        let logits = backbone.logits(&backbone.norm(&y).unwrap()).unwrap();
        let store = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(store.get(&x).is_some() && store.get(&reach).is_some());
        for (name, tensor) in frozen.iter().filter(|(_, tensor)| tensor.rank() > 1) {
            assert!(store.get(tensor).is_none(), "{name}");
        }
    };
    pass();
    ops::composed(pass);
}

/// Which of 3 · 22 targets count.
type Mask = [bool; 66];

/// A step on targets of which some count, and its gradients.
fn masked_step(
    model: &TrainModel,
    train: &TrainConfig,
    targets: &[u32],
    mask: Mask,
) -> (StepLoss, Gradients) {
    let vocab_size = model.config().vocab_size as u32;
    let shape = (3, 22);
    let tokens: Vec<u32> = (0..66).map(|n| n * 7919 % vocab_size).collect();
    let weights: Vec<f32> = mask.iter().map(|&counts| f32::from(u8::from(counts))).collect();
    let batch = StepBatch {
        tokens: Tensor::from_vec(tokens, shape, &Device::Cpu).unwrap(),
        targets: Tensor::from_slice(targets, shape, &Device::Cpu).unwrap(),
        weights: Tensor::from_vec(weights, shape, &Device::Cpu).unwrap(),
        counted: mask.iter().filter(|&&counts| counts).count().max(1) as f64,
    };
    let objective = train.method.objective(&train.routing(vec![0.2, 0.6, 1.0]));
    let teacher = train.has_teacher().then_some(Teacher::Itself);
    let context = StepContext { objective: objective.as_ref(), teacher, config: train, step: 3, micro: 0 };
    let mut gradients = Gradients::new();
    let loss = model.accumulate(&batch, &context, &mut gradients).unwrap();
    (loss, gradients)
}

fn gradient(gradients: &Gradients, var: &Var) -> Vec<f32> {
    match gradients.get(var) {
        Some(Gradient::Host(values)) => values.clone(),
        None => vec![0.0; var.elem_count()],
        found => panic!("{found:?}"),
    }
}

/// The mean loss of the targets that count at full width, by candle's own operations.
fn plain_loss(model: &TrainModel, targets: &[u32], mask: Mask) -> f64 {
    let vocab_size = model.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..66).map(|n| n * 7919 % vocab_size).collect();
    let tokens = Tensor::from_vec(tokens, (3, 22), &Device::Cpu).unwrap();
    let routed = model.routed().unwrap();
    let (hidden, _) = routed.forward(&tokens, &vec![1.0; model.config().num_hidden_layers]).unwrap();
    let log =
        candle_nn::ops::log_softmax(&routed.logits(&hidden).unwrap(), 1).unwrap().to_vec2::<f32>().unwrap();
    let losses = log.iter().zip(targets).map(|(row, &target)| -f64::from(row[target as usize]));
    let counted: Vec<f64> = losses.zip(mask).filter_map(|(loss, counts)| counts.then_some(loss)).collect();
    counted.iter().sum::<f64>() / counted.len() as f64
}

#[test]
fn a_masked_loss_is_the_mean_over_targets_that_count() {
    let mut rng = support::random::rng();
    for vocab_size in [50, 5000] {
        let train = TrainConfig { method: Method::Dense, ..TrainConfig::default() };
        let model = TrainModel::new(&config(vocab_size, false, 0), &train, &mut random()).unwrap();
        let targets: Vec<u32> = (0..66).map(|_| rng.random_range(0..vocab_size as u32)).collect();
        for share in [0.1, 0.5, 1.0] {
            let mut mask: Mask = std::array::from_fn(|_| rng.random_bool(share));
            mask[7] = true;
            let (loss, _) = masked_step(&model, &train, &targets, mask);
            let expected = plain_loss(&model, &targets, mask);
            assert!((loss.language_model - expected).abs() < 1e-4 * expected, "{loss:?} {expected}");
        }
    }
}

#[test]
fn targets_that_do_not_count_change_neither_losses_nor_gradients() {
    let mut rng = support::random::rng();
    for (vocab_size, distill) in [(50, 0.0), (50, 1.0), (5000, 0.0), (5000, 1.0)] {
        // without parts of the loss that other positions have too
        let mut train = TrainConfig { method: Method::Static, distill, ..TrainConfig::default() };
        train.tuning.set("distill-hidden=0").unwrap();
        let model = TrainModel::new(&config(vocab_size, false, 0), &train, &mut random()).unwrap();
        let mut targets: Vec<u32> = (0..66).map(|_| rng.random_range(0..vocab_size as u32)).collect();
        let mask: Mask = std::array::from_fn(|_| rng.random_bool(0.4));
        let (loss, gradients) = masked_step(&model, &train, &targets, mask);

        // the mean over all targets is made of the means over those that count and over the others
        let count = mask.iter().filter(|&&counts| counts).count() as f64;
        let others: Mask = mask.map(|counts| !counts);
        let (rest, of_rest) = masked_step(&model, &train, &targets, others);
        let (whole, of_whole) = masked_step(&model, &train, &targets, [true; 66]);
        let mean = |a: f64, b: f64| (count * a + (66.0 - count) * b) / 66.0;
        let expected = mean(loss.language_model, rest.language_model);
        assert!((whole.language_model - expected).abs() < 1e-4 * expected, "{whole:?} {loss:?} {rest:?}");
        for (name, var) in model.params().iter() {
            let [part, rest, whole] = [&gradients, &of_rest, &of_whole].map(|all| gradient(all, var));
            let largest = whole.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for ((part, rest), whole) in part.into_iter().zip(rest).zip(whole) {
                let expected = mean(f64::from(part), f64::from(rest));
                assert!((f64::from(whole) - expected).abs() < 1e-4 * f64::from(largest) + 1e-7, "{name}");
            }
        }

        // another token in a place that does not count changes nothing at all
        for (target, counts) in targets.iter_mut().zip(mask) {
            if !counts {
                *target = rng.random_range(0..vocab_size as u32);
            }
        }
        let (other, of_other) = masked_step(&model, &train, &targets, mask);
        assert_eq!(other, loss);
        for (name, var) in model.params().iter() {
            assert!(gradient(&gradients, var) == gradient(&of_other, var), "{name}");
        }
        let (none, of_none) = masked_step(&model, &train, &targets, [false; 66]);
        assert_eq!(none.language_model, 0.0);
        let zero = |var: &Var| gradient(&of_none, var).iter().all(|&value| value == 0.0);
        assert!(model.params().iter().all(|(_, var)| zero(var)));
    }
}

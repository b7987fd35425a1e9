//! A training step as a whole.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use dynamoe::{DynaMoeConfig, RouterConfig, RouterKind};
use dynamoe_model::config::{Architecture, ModelConfig};
use dynamoe_model::ops::{self, Gradient, Gradients};
use moefy_train::methods::{Method, Objective};
use moefy_train::train::{StepBatch, StepContext, TrainConfig, TrainModel};

/// A model that uses what the architectures differ in.
fn config(vocab_size: usize, extras: bool, own_shells: usize) -> ModelConfig {
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
        tie_word_embeddings: !extras,
        qkv_bias: extras,
        o_bias: extras,
        qk_norm: extras,
        sliding_window: if extras { vec![None, Some(5)] } else { vec![None; 2] },
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        dynamoe: Some(DynaMoeConfig {
            version: dynamoe::config::version_for(own_shells),
            base_architecture: "LlamaForCausalLM".into(),
            base_model_type: "llama".into(),
            expert_widths: vec![8, 24, 40],
            own_shells,
            router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 6, compensation: true },
            sensitivity: 0.5,
            budgets: Vec::new(),
        }),
    }
}

/// Another device has no fused operations, but computes the same.
#[test]
fn a_step_without_fused_operations_is_the_same_step() {
    for (vocab_size, extras, own_shells) in [(50, false, 0), (50, true, 1), (4100, true, 2)] {
        for method in [Method::Dense, Method::Static, Method::Priced, Method::Similarity] {
            let train = TrainConfig { method, ..TrainConfig::default() };
            let config = config(vocab_size, extras, own_shells);
            let mut made = BTreeMap::new();
            let mut random = |name: &str, shape: &[usize]| {
                let new = || Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap();
                Ok(made.entry(name.to_owned()).or_insert_with(new).clone())
            };
            let [one, other] = [(); 2].map(|()| TrainModel::new(&config, &train, &mut random).unwrap());
            let batch = |shift: u32| {
                let tokens: Vec<u32> = (0..66u32).map(|n| (n + shift) * 7919 % vocab_size as u32).collect();
                Tensor::from_vec(tokens, (3, 22), &Device::Cpu).unwrap()
            };
            let objective: Box<dyn Objective> = method.objective(&train.routing(vec![0.2, 0.6, 1.0]));
            let step = |model: &TrainModel, gradients: &mut Gradients| {
                let batch = StepBatch { tokens: batch(0), targets: batch(1) };
                let objective = objective.as_ref();
                let context = StepContext { objective, teacher: None, config: &train, step: 3, micro: 0 };
                let loss = model.loss(&batch, &context).unwrap();
                gradients.add(&loss.objective, model.params()).unwrap();
                loss.objective.to_scalar::<f32>().unwrap()
            };
            let (mut fused, mut composed) = (Gradients::new(), Gradients::new());
            let (a, b) = (step(&one, &mut fused), ops::composed(|| step(&other, &mut composed)));
            assert!((a - b).abs() < 1e-5 * b.abs(), "{method:?}: loss {a}, {b}");
            for ((name, var), (_, twin)) in one.params().iter().zip(other.params().iter()) {
                let values = |gradients: &Gradients, var: &Var| match gradients.get(var) {
                    Some(Gradient::Host(values)) => values.clone(),
                    found => panic!("{method:?}, {name}: {found:?}"),
                };
                let (a, b) = (values(&fused, var), values(&composed, twin));
                let scale = b.iter().fold(1e-3f32, |max, x| max.max(x.abs()));
                for (a, b) in a.iter().zip(&b) {
                    assert!((a - b).abs() < 2e-4 * scale, "{method:?}, {name}: {a}, {b}, largest {scale}");
                }
            }
        }
    }
}

//! An MoE model whose tokens run fewer of its experts.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use dynamoe_mistralrs::{LoadedModel, loaded};
use mistralrs::Model;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::{
    models::{Spread, isq, load, prompt, run},
    support::write,
};

const PROMPT_TOKENS: usize = 256;
const DECODE_PROMPT_TOKENS: usize = 8;
const NEW_TOKENS: usize = 48;

/// The layers of a model, and how many of them there are here.
#[derive(Clone, Copy)]
pub struct MoeShape {
    hidden_size: usize,
    moe_intermediate_size: usize,
    experts: usize,
    experts_per_token: usize,
    layers: usize,
    /// Heads of queries, heads of keys, size of a head.
    heads: [usize; 3],
    vocab_size: usize,
}

/// Qwen3-30B-A3B's layers; fewer of them, and a smaller vocabulary.
pub const QWEN3_30B: MoeShape = MoeShape {
    hidden_size: 2048,
    moe_intermediate_size: 768,
    experts: 128,
    experts_per_token: 8,
    layers: 2,
    heads: [32, 4, 128],
    vocab_size: 32_000,
};

/// The FFNs of OLMoE-1B-7B's layers, in Qwen3-MoE's architecture.
pub const OLMOE: MoeShape = MoeShape {
    hidden_size: 2048,
    moe_intermediate_size: 1024,
    experts: 64,
    experts_per_token: 8,
    layers: 3,
    heads: [16, 16, 128],
    vocab_size: 32_000,
};

/// A second's work.
pub const SMALL: MoeShape = MoeShape {
    hidden_size: 256,
    moe_intermediate_size: 256,
    experts: 8,
    experts_per_token: 4,
    layers: 2,
    heads: [4, 2, 64],
    vocab_size: 512,
};

impl MoeShape {
    fn config(&self) -> Value {
        let [heads, kv_heads, head_dim] = self.heads;
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": self.moe_intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size, "num_hidden_layers": self.layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "num_experts": self.experts, "num_experts_per_tok": self.experts_per_token, "norm_topk_prob": true,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": self.layers,
            "use_sliding_window": false, "vocab_size": self.vocab_size, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 256,
            "eos_token_id": 257, "torch_dtype": "bfloat16",
        })
    }

    /// Random weights, in bf16: they are large.
    fn write(&self, folder: &Path) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = |rows: usize, columns: usize, scale: f32| {
            let scale = scale / (columns as f32).sqrt();
            let numbers: Vec<f32> =
                (0..rows * columns).map(|_| scale * rng.random_range(-1.7..1.7)).collect();
            Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
        };
        let ones = |n: usize| Tensor::ones(n, DType::BF16, &Device::Cpu).unwrap();
        let (d, width) = (self.hidden_size, self.moe_intermediate_size);
        let [heads, kv_heads, head_dim] = self.heads;
        let mut tensors = BTreeMap::new();
        tensors.insert("model.embed_tokens.weight".into(), random(self.vocab_size, d, 1.0));
        tensors.insert("lm_head.weight".into(), random(self.vocab_size, d, 1.0));
        tensors.insert("model.norm.weight".into(), ones(d));
        for layer in 0..self.layers {
            let mut add =
                |name: String, tensor| tensors.insert(format!("model.layers.{layer}.{name}"), tensor);
            for (name, rows, columns) in [
                ("q_proj", heads * head_dim, d),
                ("k_proj", kv_heads * head_dim, d),
                ("v_proj", kv_heads * head_dim, d),
                ("o_proj", d, heads * head_dim),
            ] {
                add(format!("self_attn.{name}.weight"), random(rows, columns, 1.0));
            }
            for (name, n) in [("q_norm", head_dim), ("k_norm", head_dim)] {
                add(format!("self_attn.{name}.weight"), ones(n));
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("{name}.weight"), ones(d));
            }
            // weights of a token's experts that differ by a few times, as in trained models
            add("mlp.gate.weight".into(), random(self.experts, d, 2.0));
            for expert in 0..self.experts {
                for (name, rows, columns) in
                    [("gate_proj", width, d), ("up_proj", width, d), ("down_proj", d, width)]
                {
                    add(format!("mlp.experts.{expert}.{name}.weight"), random(rows, columns, 1.0));
                }
            }
        }
        write(folder, &self.config(), &tensors);
    }

    /// Weights that a token reads outside of the experts but for the output matrix, in the output matrix, and in all of
    /// its experts.
    fn weights(&self) -> [f64; 3] {
        let [heads, kv_heads, head_dim] = self.heads;
        let (d, layers) = (self.hidden_size, self.layers);
        let attention = layers * (d * head_dim * 2 * (heads + kv_heads) + d * self.experts);
        let experts = layers * self.experts_per_token * 3 * d * self.moe_intermediate_size;
        [attention, d * self.vocab_size, experts].map(|weights| weights as f64)
    }
}

struct Case {
    name: &'static str,
    sensitivity: Option<f64>,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    prefill_share: f64,
    decode_share: f64,
}

/// Prints prefill and decode at several budgets.
pub async fn measure(
    folder: &Path,
    name: &str,
    shape: MoeShape,
    precision: &str,
    rounds: usize,
) -> Result<()> {
    if !folder.join("config.json").exists() {
        std::fs::create_dir_all(folder)?;
        shape.write(folder);
    }
    let model = load(folder, isq(precision)?, precision).await?;
    let handle = loaded().pop().context("the MoE model is not listed")?;
    println!("{name}, {precision}, {} threads, {rounds} rounds\n", std::thread::available_parallelism()?);
    let mut cases = Vec::new();
    for (name, budget) in [
        ("no dial", None),
        ("budget 1", Some(1.0)),
        ("0.75", Some(0.75)),
        ("0.5", Some(0.5)),
        ("0.25", Some(0.25)),
    ] {
        let sensitivity = match budget {
            Some(budget) => Some(sensitivity_for(&model, &handle, budget).await?),
            None => None,
        };
        let (prefill, decode) = (Vec::new(), Vec::new());
        cases.push(Case { name, sensitivity, prefill, decode, prefill_share: 1.0, decode_share: 1.0 });
    }
    let (long, short) = (prompt(1, PROMPT_TOKENS), prompt(2, DECODE_PROMPT_TOKENS));
    for round in 0..=rounds {
        for case in &mut cases {
            let run = async |prompt: &[u32], new| run(&model, &handle, case.sensitivity, prompt, new).await;
            let prefill = run(&long, 1).await?;
            let first = run(&short, 1).await?;
            let decode = run(&short, 1 + NEW_TOKENS).await?;
            (case.prefill_share, case.decode_share) = (prefill.width, decode.width);
            // the first round warms up
            if round > 0 {
                case.prefill.push(prefill.seconds / PROMPT_TOKENS as f64);
                case.decode.push((decode.seconds - first.seconds) / NEW_TOKENS as f64);
            }
        }
    }
    let [attention, output, experts] = shape.weights();
    let table = |title: &str, others: f64, of: fn(&Case) -> (&Vec<f64>, f64)| {
        println!("{title}\n\n| | share of the experts | tokens/s | × no dial | ideal | of ideal |");
        println!("| --- | --- | --- | --- | --- | --- |");
        let (reference, _) = of(&cases[0]);
        for case in &cases {
            let (times, share) = of(case);
            let ideal = (others + experts) / (others + experts * share);
            let rate = Spread::of(times.iter().map(|time| 1.0 / time));
            let ratio = Spread::of(reference.iter().zip(times).map(|(reference, time)| reference / time));
            let of_ideal = 100.0 * ratio.median / ideal;
            println!(
                "| {} | {share:.3} | {} | {} | {ideal:.3} | {of_ideal:.0} % |",
                case.name,
                rate.show(1),
                ratio.show(3)
            );
        }
        println!();
    };
    // the output matrix is multiplied with one token of a prompt only
    table(&format!("prefill of {PROMPT_TOKENS} tokens"), attention, |case| {
        (&case.prefill, case.prefill_share)
    });
    table(&format!("decode of {NEW_TOKENS} tokens"), attention + output, |case| {
        (&case.decode, case.decode_share)
    });
    Ok(())
}

/// The sensitivity whose mean share of the experts on a prompt is nearest to `target`.
async fn sensitivity_for(model: &Model, handle: &Arc<LoadedModel>, target: f64) -> Result<f64> {
    if target >= 1.0 {
        return Ok(1.0);
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..10 {
        let middle = f64::midpoint(low, high);
        let took = run(model, handle, Some(middle), &prompt(7, 64), 1).await?;
        if took.width < target { low = middle } else { high = middle }
    }
    Ok(f64::midpoint(low, high))
}

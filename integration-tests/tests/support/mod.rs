//! Tiny checkpoints with random weights, written as Hugging Face folders.

#![allow(dead_code)] // each test file uses some of it

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use dynamoe::config::{ARCHITECTURE, MODEL_TYPE};
use rand::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The base models of the trainer, which the engine and transformers have too.
pub const ARCHITECTURES: [&str; 9] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
];

/// Tokens of the byte-level tokenizer: one for each byte, then `<s>` and `</s>`.
pub const VOCAB_SIZE: usize = 258;

/// The shape of a checkpoint.
#[derive(Clone, Copy)]
pub struct Shape {
    pub hidden_size: usize,
    pub expert_widths: [usize; 4],
    /// For how many of the first shells the smaller experts have separate weights.
    pub separate_shells: usize,
    pub layers: usize,
    /// Heads of queries, heads of keys, size of a head.
    pub heads: [usize; 3],
    pub vocab_size: usize,
    /// Whether the embedding is the output matrix too, where the architecture leaves it open.
    pub tied: bool,
    pub positions: usize,
    pub router_hidden_size: usize,
}

/// Fast, and every width fits blocks of 32.
pub const SMALL: Shape = Shape {
    hidden_size: 64,
    expert_widths: [64, 128, 192, 256],
    separate_shells: 0,
    layers: 2,
    heads: [4, 2, 16],
    vocab_size: VOCAB_SIZE,
    tied: false,
    positions: 512,
    router_hidden_size: 8,
};

/// Every width fits a K-quant's blocks of 256.
pub const FOR_K_QUANTS: Shape =
    Shape { hidden_size: 256, expert_widths: [256, 512, 768, 1024], heads: [4, 2, 64], ..SMALL };

/// A dense checkpoint and the DynaMoE checkpoint over the same weights.
pub struct Checkpoints {
    folder: TempDir,
    tensors: BTreeMap<String, Tensor>,
    dense_config: Value,
    /// config.json of the DynaMoE checkpoint.
    pub config: Value,
}

impl Checkpoints {
    pub fn dense(&self) -> String {
        self.folder.path().join("dense").display().to_string()
    }

    pub fn dynamoe(&self) -> String {
        self.folder.path().join("dynamoe").display().to_string()
    }

    /// Writes the dense checkpoint once more, with other weights, and returns its folder.
    pub fn write_dense(&self, name: &str, weight: impl Fn(&str, &Tensor) -> Tensor) -> String {
        let is_dense =
            |name: &str| !["router", "compensation", "own."].iter().any(|part| name.contains(part));
        let dense = self.tensors.iter().filter(|(name, _)| is_dense(name));
        let tensors = dense.map(|(name, tensor)| (name.clone(), weight(name, tensor))).collect();
        let folder = self.folder().join(name);
        write(&folder, &self.dense_config, &tensors);
        folder.display().to_string()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A tensor of the DynaMoE checkpoint.
    pub fn get(&self, name: &str, shape: &[usize]) -> anyhow::Result<Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| anyhow::anyhow!("no tensor {name}"))?;
        anyhow::ensure!(tensor.dims() == shape, "{name}: {:?}, not {shape:?}", tensor.dims());
        Ok(tensor.clone())
    }
}

/// What sets a base architecture apart from Llama.
struct Base {
    model_type: &'static str,
    qkv_bias: bool,
    qk_norm: bool,
    /// Gemma's norms scale by `1 + w`.
    norm_offset: f64,
    /// Norms around the FFN, of Gemma 2 and 3.
    ffn_norms: bool,
    tied: bool,
    config: Value,
}

fn base(architecture: &str) -> Base {
    let plain = |model_type| Base {
        model_type,
        qkv_bias: false,
        qk_norm: false,
        norm_offset: 0.0,
        ffn_norms: false,
        tied: false,
        config: json!({"hidden_act": "silu"}),
    };
    match architecture {
        "LlamaForCausalLM" => plain("llama"),
        "MistralForCausalLM" => {
            Base { config: json!({"hidden_act": "silu", "sliding_window": null}), ..plain("mistral") }
        }
        "Qwen2ForCausalLM" => Base {
            qkv_bias: true,
            config: json!({"hidden_act": "silu", "sliding_window": 4096, "use_sliding_window": false,
                           "max_window_layers": 2}),
            ..plain("qwen2")
        },
        "Qwen3ForCausalLM" => Base {
            qk_norm: true,
            config: json!({"hidden_act": "silu", "sliding_window": null, "use_sliding_window": false,
                           "max_window_layers": 2, "attention_bias": false}),
            ..plain("qwen3")
        },
        "SmolLM3ForCausalLM" => Base {
            tied: true,
            config: json!({"hidden_act": "silu", "no_rope_layer_interval": 2, "attention_bias": false,
                           "pad_token_id": 256}),
            ..plain("smollm3")
        },
        "GemmaForCausalLM" => Base {
            norm_offset: -1.0,
            tied: true,
            config: json!({"hidden_act": "gelu_pytorch_tanh", "attention_bias": false}),
            ..plain("gemma")
        },
        "Gemma2ForCausalLM" => Base {
            norm_offset: -1.0,
            ffn_norms: true,
            tied: true,
            config: json!({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
                           "attention_bias": false, "attn_logit_softcapping": 50.0,
                           "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16, "sliding_window": 4096}),
            ..plain("gemma2")
        },
        "Gemma3ForCausalLM" => Base {
            norm_offset: -1.0,
            qk_norm: true,
            ffn_norms: true,
            tied: true,
            config: json!({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": false,
                           "query_pre_attn_scalar": 20, "sliding_window": 4096, "sliding_window_pattern": 2,
                           "rope_local_base_freq": 100.0}),
            ..plain("gemma3_text")
        },
        "GraniteForCausalLM" => Base {
            config: json!({"hidden_act": "silu", "attention_bias": false, "embedding_multiplier": 6.0,
                           "attention_multiplier": 0.125, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
            ..plain("granite")
        },
        other => panic!("no fixture for {other}"),
    }
}

/// Random numbers in the order in which they are asked for.
struct Numbers(rand_chacha::ChaCha8Rng);

impl Numbers {
    /// Normal with mean `mean` and standard deviation `deviation`.
    fn tensor(&mut self, shape: &[usize], mean: f64, deviation: f64) -> Tensor {
        let normal = |rng: &mut _| -> f64 { StandardNormal.sample(rng) };
        let count = shape.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| (mean + deviation * normal(&mut self.0)) as f32).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    /// A matrix that keeps the size of what it maps.
    fn matrix(&mut self, rows: usize, columns: usize) -> Tensor {
        self.tensor(&[rows, columns], 0.0, 1.0 / (columns as f64).sqrt())
    }
}

/// Writes both checkpoints of a base architecture; equal seeds give equal weights.
pub fn checkpoints(architecture: &str, shape: Shape, seed: u64) -> Checkpoints {
    let folder = TempDir::new().unwrap();
    let (tensors, config) = write_checkpoints(folder.path(), architecture, shape, seed);
    let dense_config = fs::read(folder.path().join("dense/config.json")).unwrap();
    let dense_config = serde_json::from_slice(&dense_config).unwrap();
    Checkpoints { folder, tensors, dense_config, config }
}

/// Writes both into `folder`, as `dense` and `dynamoe`, and returns the tensors and config.json of the latter.
pub fn write_checkpoints(
    folder: &Path,
    architecture: &str,
    shape: Shape,
    seed: u64,
) -> (BTreeMap<String, Tensor>, Value) {
    let mut base = base(architecture);
    base.tied |= shape.tied;
    let (d, width, vocab_size) = (shape.hidden_size, shape.expert_widths[3], shape.vocab_size);
    let [heads, kv_heads, head_dim] = shape.heads;
    let mut numbers = Numbers(rand_chacha::ChaCha8Rng::seed_from_u64(seed));
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, tensor: Tensor| tensors.insert(name, tensor);
    let norm = |numbers: &mut Numbers, n: usize| numbers.tensor(&[n], 1.0 + base.norm_offset, 0.1);

    add("model.embed_tokens.weight".into(), numbers.tensor(&[vocab_size, d], 0.0, 1.0));
    for layer in 0..shape.layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        for (name, rows) in [("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)] {
            add(at(&format!("self_attn.{name}.weight")), numbers.matrix(rows * head_dim, d));
            if base.qkv_bias {
                add(at(&format!("self_attn.{name}.bias")), numbers.tensor(&[rows * head_dim], 0.0, 0.1));
            }
        }
        add(at("self_attn.o_proj.weight"), numbers.matrix(d, heads * head_dim));
        let mut norms = vec!["input_layernorm", "post_attention_layernorm"];
        if base.ffn_norms {
            norms.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
        }
        for name in norms {
            add(at(&format!("{name}.weight")), norm(&mut numbers, d));
        }
        if base.qk_norm {
            add(at("self_attn.q_norm.weight"), norm(&mut numbers, head_dim));
            add(at("self_attn.k_norm.weight"), norm(&mut numbers, head_dim));
        }
        add(at("mlp.gate_proj.weight"), numbers.matrix(width, d));
        add(at("mlp.up_proj.weight"), numbers.matrix(width, d));
        add(at("mlp.down_proj.weight"), numbers.matrix(d, width));
    }
    add("model.norm.weight".into(), norm(&mut numbers, d));
    if !base.tied {
        add("lm_head.weight".into(), numbers.matrix(vocab_size, d));
    }

    let dense = config(architecture, &base, shape);
    write(&folder.join("dense"), &dense, &tensors);
    for layer in 0..shape.layers {
        tensors.extend(router(layer, shape, &mut numbers));
        if let Some(last) = shape.separate_shells.checked_sub(1) {
            let p = shape.expert_widths[last];
            for (name, rows, columns) in [("gate_proj", p, d), ("up_proj", p, d), ("down_proj", d, p)] {
                let name = format!("model.layers.{layer}.mlp.own.{name}.weight");
                tensors.insert(name, numbers.matrix(rows, columns));
            }
        }
    }
    let alternating = |even: f64, odd: f64| -> Vec<f64> {
        (0..shape.layers).map(|layer| if layer % 2 == 0 { even } else { odd }).collect()
    };
    let mut config = dense;
    config["architectures"] = json!([ARCHITECTURE]);
    config["model_type"] = MODEL_TYPE.into();
    config["dynamoe"] = json!({
        "version": 1, "base_architecture": architecture, "base_model_type": base.model_type,
        "expert_widths": shape.expert_widths, "sensitivity": 0.5,
        "router": {"kind": "mlp", "hidden_size": shape.router_hidden_size, "compensation": true},
        "budgets": [{"width": 0.5, "sensitivity": alternating(0.3, 0.4)}, {"width": 0.75, "sensitivity": alternating(0.5, 0.6)}],
    });
    if shape.separate_shells > 0 {
        config["dynamoe"]["version"] = 2.into();
        config["dynamoe"]["own_shells"] = shape.separate_shells.into();
    }
    if architecture.starts_with("Gemma") {
        config["dynamoe"]["version"] = 3.into();
        config["dynamoe"]["hidden_act"] = "gelu_pytorch_tanh".into();
    }
    write(&folder.join("dynamoe"), &config, &tensors);
    (tensors, config)
}

fn config(architecture: &str, base: &Base, shape: Shape) -> Value {
    let [heads, kv_heads, head_dim] = shape.heads;
    let mut config = json!({
        "architectures": [architecture], "model_type": base.model_type,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.expert_widths[3], "num_hidden_layers": shape.layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": base.tied, "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32",
    });
    let (config, extra) = (config.as_object_mut().unwrap(), base.config.as_object().unwrap());
    config.extend(extra.clone());
    Value::Object(config.clone())
}

/// A router whose scores lie around one half, so that every expert is used at a sensitivity of one half.
fn router(layer: usize, shape: Shape, numbers: &mut Numbers) -> Vec<(String, Tensor)> {
    let (d, r, narrower) = (shape.hidden_size, shape.router_hidden_size, shape.expert_widths.len() - 1);
    vec![
        (dynamoe::tensors::ROUTER_FC1_WEIGHT, numbers.matrix(r, d)),
        (dynamoe::tensors::ROUTER_FC1_BIAS, numbers.tensor(&[r], 0.0, 0.1)),
        (dynamoe::tensors::ROUTER_FC2_WEIGHT, numbers.tensor(&[narrower, r], 0.0, 1.0)),
        (dynamoe::tensors::ROUTER_FC2_BIAS, numbers.tensor(&[narrower], -0.3, 0.1)),
        (dynamoe::tensors::COMPENSATION, numbers.tensor(&[narrower, d], 0.0, 0.1)),
    ]
    .into_iter()
    .map(|(name, tensor)| (dynamoe::tensors::full_name(layer, name), tensor))
    .collect()
}

/// Writes a checkpoint.
pub fn write(folder: &Path, config: &Value, tensors: &BTreeMap<String, Tensor>) {
    fs::create_dir_all(folder).unwrap();
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let json = |name: &str, value: &Value| fs::write(folder.join(name), value.to_string()).unwrap();
    json("config.json", config);
    json("tokenizer.json", &tokenizer());
    json(
        "tokenizer_config.json",
        &json!({
            "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
            "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        }),
    );
}

/// Changes a file of JSON in a folder.
pub fn edit_json(folder: &str, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = Path::new(folder).join(file);
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Byte-level BPE without merges: a token is a byte.
fn tokenizer() -> Value {
    // GPT-2's letters for bytes: printable ones stand for themselves, the others for 256, 257, …
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let letter = |byte: u32| if printable(byte) { byte } else { others.next().unwrap() };
    let letters: Vec<u32> = (0..256).map(letter).collect();
    let vocab: serde_json::Map<String, Value> = letters
        .into_iter()
        .enumerate()
        .map(|(id, letter)| (char::from_u32(letter).unwrap().to_string(), id.into()))
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<s>"), special(257, "</s>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": []},
    })
}

/// Normal numbers.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    Numbers(rand_chacha::ChaCha8Rng::seed_from_u64(seed)).tensor(shape, 0.0, 0.5)
}

/// The largest difference of two equally long lists, which must not hold anything but numbers.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|x| x.is_finite()));
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// All numbers of a tensor, as f32.
pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

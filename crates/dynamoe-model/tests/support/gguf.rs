//! GGUF files of dense folders, made as llama.cpp makes them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use dynamoe_model::config::{Architecture, RopeScaling};
use dynamoe_model::{Checkpoint, ModelConfig};

/// A file in the making.
pub struct Made {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl Made {
    /// Of a folder, its matrices in this type, without a tokenizer.
    pub fn of(source: &Checkpoint, kind: GgmlDType) -> Self {
        let config = source.config();
        let mut made = Self { metadata: metadata(config), tensors: BTreeMap::new() };
        let llama = matches!(config.architecture, Architecture::Llama | Architecture::Mistral);
        for name in source.names() {
            let tensor = read(source, name);
            let tensor = if llama { interleave(name, tensor, config) } else { tensor };
            let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { kind };
            made.tensors.insert(theirs(name), QTensor::quantize(&tensor, kind).unwrap());
        }
        if let Some(scaling) = &config.rope_scaling {
            made.scale(config, scaling);
        }
        made
    }

    fn scale(&mut self, config: &ModelConfig, scaling: &RopeScaling) {
        let kind = match scaling {
            RopeScaling::Linear(factor) => {
                self.set("rope.scaling.factor", Value::F32(*factor as f32));
                "linear"
            }
            RopeScaling::Llama3(rope) => {
                let (theta, d) = (config.rope_theta, config.head_dim);
                let (plain, _) = RopeScaling::frequencies(theta, d, None);
                let (slowed, _) = RopeScaling::frequencies(theta, d, Some(scaling));
                let factors: Vec<f32> = plain.iter().zip(&slowed).map(|(a, b)| (a / b) as f32).collect();
                let factors = Tensor::new(factors, &Device::Cpu).unwrap();
                let factors = QTensor::quantize(&factors, GgmlDType::F32).unwrap();
                self.tensors.insert("rope_freqs.weight".into(), factors);
                let original = rope.original_max_position_embeddings as u32;
                return self.set("rope.scaling.original_context_length", Value::U32(original));
            }
            RopeScaling::Yarn(rope) => {
                let original = rope.original_max_position_embeddings as u32;
                self.set("rope.scaling.original_context_length", Value::U32(original));
                self.set("rope.scaling.factor", Value::F32(rope.factor as f32));
                self.set("rope.scaling.yarn_beta_fast", Value::F32(rope.beta_fast as f32));
                self.set("rope.scaling.yarn_beta_slow", Value::F32(rope.beta_slow as f32));
                let usual = 0.1 * rope.factor.ln() + 1.0;
                self.set("rope.scaling.attn_factor", Value::F32((rope.attention_factor / usual) as f32));
                "yarn"
            }
        };
        self.set("rope.scaling.type", text(kind));
    }

    /// Sets a key of the architecture.
    pub fn set(&mut self, key: &str, value: Value) {
        let architecture = self.metadata["general.architecture"].to_string().unwrap().clone();
        self.metadata.insert(format!("{architecture}.{key}"), value);
    }

    /// Adds the tokenizer of a tokenizer.json whose model merges bytes.
    pub fn tokenizer(&mut self, json: &serde_json::Value, pre: &str) {
        let special = |id: u64| {
            let added = json["added_tokens"].as_array().unwrap().iter();
            added.into_iter().any(|token| token["id"].as_u64() == Some(id))
        };
        let mut tokens: Vec<(u64, &str)> = Vec::new();
        for (token, id) in json["model"]["vocab"].as_object().unwrap() {
            tokens.push((id.as_u64().unwrap(), token));
        }
        tokens.sort();
        let kinds = tokens.iter().map(|(id, _)| Value::I32(if special(*id) { 3 } else { 1 })).collect();
        let merges = json["model"]["merges"].as_array().unwrap().iter();
        let merges =
            merges.map(|pair| text(&format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())));
        let tokens = tokens.into_iter().map(|(_, token)| text(token)).collect();
        for (key, value) in [
            ("model", text("gpt2")),
            ("pre", text(pre)),
            ("tokens", Value::Array(tokens)),
            ("token_type", Value::Array(kinds)),
            ("merges", Value::Array(merges.collect())),
        ] {
            self.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        }
    }

    pub fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

pub fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

/// A tensor of a folder in f32.
pub fn read(source: &Checkpoint, name: &str) -> Tensor {
    source.tensor(name, &source.info(name).unwrap().shape, DType::F32, &Device::Cpu).unwrap()
}

fn metadata(config: &ModelConfig) -> BTreeMap<String, Value> {
    let architecture = match config.architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        other => panic!("{}: not an architecture that is read from GGUF", other.name()),
    };
    let whole = |number: usize| Value::U32(number as u32);
    let head_dim = config.head_dim;
    let mut metadata: BTreeMap<String, Value> = [
        ("block_count", whole(config.num_hidden_layers)),
        ("context_length", whole(config.max_position_embeddings)),
        ("embedding_length", whole(config.hidden_size)),
        ("feed_forward_length", whole(config.intermediate_size)),
        ("attention.head_count", whole(config.num_attention_heads)),
        ("attention.head_count_kv", whole(config.num_key_value_heads)),
        ("attention.key_length", whole(head_dim)),
        ("attention.value_length", whole(head_dim)),
        ("rope.dimension_count", whole(head_dim)),
        ("rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
    ]
    .into_iter()
    .map(|(key, value)| (format!("{architecture}.{key}"), value))
    .collect();
    if let Some(window) = config.sliding_window[0] {
        metadata.insert(format!("{architecture}.attention.sliding_window"), whole(window));
    }
    metadata.insert("general.architecture".into(), text(architecture));
    for (key, id) in [("bos", config.bos_token_id), ("eos", config.eos_token_ids.first().copied())] {
        if let Some(id) = id {
            metadata.insert(format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
        }
    }
    metadata
}

/// llama.cpp's name of a tensor.
fn theirs(name: &str) -> String {
    let mut name = name.to_owned();
    for (ours, theirs) in [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(ours, theirs);
    }
    name
}

/// The rows of q and k with the halves of each head interleaved.
fn interleave(name: &str, tensor: Tensor, config: &ModelConfig) -> Tensor {
    if !name.contains("q_proj") && !name.contains("k_proj") {
        return tensor;
    }
    let (shape, d) = (tensor.dims().to_vec(), config.head_dim);
    let halves = tensor.reshape((shape[0] / d, 2, d / 2, ())).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
}

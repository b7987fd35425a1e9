//! Tiny random dense checkpoints, with the tensors that `expected_tensors` lists.
#![allow(dead_code)] // each test program uses a part

pub mod disk;
pub mod random;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::config::ModelConfig;
use dynamoe_model::tensors::expected_tensors;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

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
pub const HIDDEN: usize = 16;
pub const WIDTH: usize = 24;
pub const LAYERS: usize = 2;

/// A config.json as transformers writes it, of a tiny model.
pub fn config(architecture: &str) -> Value {
    let model_type = match architecture {
        "Gemma3ForCausalLM" => "gemma3_text".to_owned(),
        _ => architecture.trim_end_matches("ForCausalLM").to_lowercase(),
    };
    let tied = ["Qwen2ForCausalLM", "Gemma2ForCausalLM"].contains(&architecture);
    let mut config = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 20,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "a_key_nobody_knows": { "z": 1, "a": 2 }
    });
    match architecture {
        "Qwen3ForCausalLM" => config["head_dim"] = json!(8),
        "MistralForCausalLM" => config["sliding_window"] = json!(8),
        "SmolLM3ForCausalLM" => config["no_rope_layer_interval"] = json!(2),
        "Gemma2ForCausalLM" => {
            config["sliding_window"] = json!(8);
            config["query_pre_attn_scalar"] = json!(6);
        }
        "Gemma3ForCausalLM" => {
            config["sliding_window"] = json!(8);
            config["sliding_window_pattern"] = json!(2);
        }
        "GraniteForCausalLM" => config["residual_multiplier"] = json!(0.5),
        _ => {}
    }
    if architecture.starts_with("Gemma") {
        config["head_dim"] = json!(4);
    } else {
        config["hidden_act"] = json!("silu");
    }
    config
}

/// Normally distributed values in a type, as bytes.
pub fn random_bytes(rng: &mut ChaCha8Rng, count: usize, dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let value: f32 = StandardNormal.sample(rng);
        match dtype {
            Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
            _ => bytes.extend(value.to_le_bytes()),
        }
    }
    bytes
}

/// Writes a random checkpoint of this config.json in `shards` files, with some companion files.
pub fn write(dir: &Path, config: &Value, dtype: Dtype, shards: usize) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), serde_json::to_string_pretty(config).unwrap()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    std::fs::write(dir.join("LICENSE"), "free").unwrap();
    std::fs::write(dir.join("training_args.bin"), "not a part of the model").unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
        expected_tensors(&ModelConfig::from_json(config).unwrap())
            .into_iter()
            .map(|(name, shape)| {
                let bytes = random_bytes(&mut rng, shape.iter().product(), dtype);
                (name, shape, bytes)
            })
            .collect();
    let save = |part: &[(String, Vec<usize>, Vec<u8>)], file: &str| {
        let views = part.iter().map(|(n, s, b)| (n, TensorView::new(dtype, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(file)).unwrap();
    };
    if shards == 1 {
        return save(&tensors, "model.safetensors");
    }
    let mut weight_map = BTreeMap::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", number + 1);
        save(part, &file);
        weight_map.extend(part.iter().map(|(name, ..)| (name.clone(), file.clone())));
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A tensor's values.
pub fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let shape = checkpoint.info(name).unwrap_or_else(|| panic!("{name} missing")).shape.clone();
    let tensor = checkpoint.tensor(name, &shape, DType::F32, &Device::Cpu).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The files of a folder with their content, to show that nothing has touched them.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap_or_default()))
        .collect()
}

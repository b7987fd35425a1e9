//! Hugging Face's config.json of a decoder-only language model, dense or DynaMoE.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use dynamoe::config::DynaMoeConfig;
use serde_json::Value;

/// A supported base architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`
    Llama,
    /// `MistralForCausalLM`
    Mistral,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `Qwen3ForCausalLM`
    Qwen3,
}

/// Llama 3's stretching of the rotary frequencies (`rope_type: "llama3"`).
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Rope {
    /// `factor`
    pub factor: f64,
    /// `low_freq_factor`
    pub low_freq_factor: f64,
    /// `high_freq_factor`
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`
    pub original_max_position_embeddings: usize,
}

/// Rescaling of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by a factor (`rope_type: "linear"`).
    Linear(f64),
    /// Llama 3's.
    Llama3(Llama3Rope),
}

/// What the model code needs to know, whatever the architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The base architecture.
    pub architecture: Architecture,
    /// `hidden_size`, D.
    pub hidden_size: usize,
    /// `intermediate_size`, I.
    pub intermediate_size: usize,
    /// `num_hidden_layers`, L.
    pub num_hidden_layers: usize,
    /// `num_attention_heads`, H.
    pub num_attention_heads: usize,
    /// `num_key_value_heads`, K.
    pub num_key_value_heads: usize,
    /// `head_dim`, d.
    pub head_dim: usize,
    /// `vocab_size`, V.
    pub vocab_size: usize,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `rope_scaling`, none for plain rotary embeddings.
    pub rope_scaling: Option<RopeScaling>,
    /// `tie_word_embeddings`: the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v projections carry biases.
    pub qkv_bias: bool,
    /// The attention's output projection carries a bias.
    pub o_bias: bool,
    /// RMS norms over the head dimension of q and k (Qwen3).
    pub qk_norm: bool,
    /// For each layer: the attention window, none for full attention.
    pub sliding_window: Vec<Option<usize>>,
    /// `bos_token_id`, where the config has one.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`: none, one or several.
    pub eos_token_ids: Vec<u32>,
    /// Our section, for a DynaMoE checkpoint.
    pub dynamoe: Option<DynaMoeConfig>,
}

/// Base architectures by their name in `architectures`.
const ARCHITECTURES: [(&str, Architecture); 4] = [
    ("LlamaForCausalLM", Architecture::Llama),
    ("MistralForCausalLM", Architecture::Mistral),
    ("Qwen2ForCausalLM", Architecture::Qwen2),
    ("Qwen3ForCausalLM", Architecture::Qwen3),
];

/// Bounds that no model comes near; they keep a hostile config.json from asking for absurd allocations.
const MAX_DIMENSION: u64 = 1 << 28;
const MAX_LAYERS: usize = 10_000;

impl Architecture {
    /// The name in config.json's `architectures`.
    pub fn name(self) -> &'static str {
        ARCHITECTURES.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }

    fn from_name(name: &str) -> Result<Self> {
        ARCHITECTURES.iter().find(|(known, _)| *known == name).map(|(_, a)| *a).with_context(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|(known, _)| *known).collect();
            format!(
                "architecture {name:?} is not supported; supported: {}, {}",
                known.join(", "),
                dynamoe::config::ARCHITECTURE
            )
        })
    }
}

/// `dir/config.json`, keys in the file's order.
///
/// # Errors
/// A missing file, or one that is not a JSON object.
pub fn read_json(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!("{}: cannot be read; a model is a folder with config.json and *.safetensors", path.display())
    })?;
    let value: Value =
        serde_json::from_str(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
    ensure!(value.is_object(), "{}: expected a JSON object", path.display());
    Ok(value)
}

impl ModelConfig {
    /// `H_e` of every layer; a dense model has one expert.
    pub fn expert_widths(&self) -> Vec<usize> {
        self.dynamoe.as_ref().map_or_else(|| vec![self.intermediate_size], |d| d.expert_widths.clone())
    }

    /// `H_e / I` of each expert, ascending to 1.
    pub fn width_shares(&self) -> Vec<f64> {
        let full = self.intermediate_size as f64;
        self.expert_widths().into_iter().map(|width| width as f64 / full).collect()
    }

    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// A missing or broken file, an unsupported architecture (the message lists those supported), an option
    /// that changes the computation and is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::from_json(&read_json(dir)?).with_context(|| dir.join("config.json").display().to_string())
    }

    /// Reads a parsed config.json. Absent keys take the default of transformers' class for the architecture,
    /// but for token ids (absent means none) and `num_key_value_heads` (absent means `num_attention_heads`).
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_json(json: &Value) -> Result<Self> {
        let keys = Keys(json);
        let name = json
            .pointer("/architectures/0")
            .and_then(Value::as_str)
            .context("\"architectures\": expected a list with one name")?;
        let dynamoe = match name {
            dynamoe::config::ARCHITECTURE => Some(DynaMoeConfig::from_config_json(json)?),
            _ => None,
        };
        let architecture =
            Architecture::from_name(dynamoe.as_ref().map_or(name, |d| d.base_architecture.as_str()))?;
        refuse_unsupported(&keys)?;

        let hidden_size = keys.size("hidden_size")?;
        let num_hidden_layers = keys.size("num_hidden_layers")?;
        ensure!(
            num_hidden_layers <= MAX_LAYERS,
            "\"num_hidden_layers\": at most {MAX_LAYERS} expected, found {num_hidden_layers}"
        );
        let (num_attention_heads, num_key_value_heads) = heads(&keys)?;
        let default_positions = match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        };
        let (rope_theta, rope_scaling) = rope(&keys)?;
        let attention_bias = matches!(architecture, Architecture::Llama | Architecture::Qwen3)
            && keys.flag("attention_bias")?;
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim: head_dim(&keys, architecture, hidden_size, num_attention_heads)?,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings: keys
                .optional_size("max_position_embeddings")?
                .unwrap_or(default_positions),
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            o_bias: attention_bias,
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: sliding_window(&keys, architecture, num_hidden_layers)?,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
            dynamoe,
        })
    }
}

/// Options that change the computation in ways that this crate does not know.
fn refuse_unsupported(keys: &Keys) -> Result<()> {
    if let Some(found) = keys.get("quantization_config") {
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        bail!(
            "the weights are quantized (quantization_config, method {method:?}): give the unquantized model (F32, F16 or BF16)"
        );
    }
    if let Some(found) = keys.get("hidden_act").filter(|v| v.as_str() != Some("silu")) {
        bail!("\"hidden_act\": only \"silu\" is supported, found {found}");
    }
    ensure!(!keys.flag("mlp_bias")?, "\"mlp_bias\": FFN biases are not supported");
    let rotary = keys.number("partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(rotary == 1.0, "\"partial_rotary_factor\": only 1 is supported, found {rotary}");
    Ok(())
}

/// `num_attention_heads` and `num_key_value_heads`.
fn heads(keys: &Keys) -> Result<(usize, usize)> {
    let heads = keys.size("num_attention_heads")?;
    let shared = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
    ensure!(
        heads.is_multiple_of(shared),
        "\"num_attention_heads\" {heads} is not a multiple of \"num_key_value_heads\" {shared}"
    );
    Ok((heads, shared))
}

fn head_dim(keys: &Keys, architecture: Architecture, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match keys.optional_size("head_dim")? {
        Some(given) => given,
        // transformers' Qwen3Config has a default of its own; a null means D / H everywhere
        None if architecture == Architecture::Qwen3 && keys.0.get("head_dim").is_none() => 128,
        None => {
            ensure!(
                hidden_size.is_multiple_of(heads),
                "\"hidden_size\" {hidden_size} is not a multiple of \"num_attention_heads\" {heads} and \"head_dim\" is not given"
            );
            hidden_size / heads
        }
    };
    ensure!(
        head_dim.is_multiple_of(2),
        "\"head_dim\": rotary embeddings need an even number, found {head_dim}"
    );
    Ok(head_dim)
}

/// `rope_theta` and the scaling, from `rope_scaling` or transformers 5's `rope_parameters`.
fn rope(keys: &Keys) -> Result<(f64, Option<RopeScaling>)> {
    let (section, found) = match keys.get("rope_parameters") {
        Some(found) => ("rope_parameters", Some(found)),
        None => ("rope_scaling", keys.get("rope_scaling")),
    };
    let theta = keys.number("rope_theta")?;
    let Some(found) = found else { return Ok((theta.unwrap_or(10_000.0), None)) };
    let rope = Keys(found);
    let kind = rope
        .get("rope_type")
        .or_else(|| rope.get("type"))
        .map_or(Some("default"), Value::as_str)
        .with_context(|| format!("\"{section}\": \"rope_type\" must be a string, found {found}"))?;
    let parse = || -> Result<_> {
        let needed = |key: &str| rope.number(key)?.with_context(|| format!("\"{key}\" is missing"));
        let rotary = rope.number("partial_rotary_factor")?.unwrap_or(1.0);
        ensure!(rotary == 1.0, "\"partial_rotary_factor\": only 1 is supported, found {rotary}");
        Ok(match kind {
            "default" => None,
            "linear" => Some(RopeScaling::Linear(needed("factor")?)),
            "llama3" => Some(RopeScaling::Llama3(Llama3Rope {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_max_position_embeddings: rope.size("original_max_position_embeddings")?,
            })),
            other => {
                bail!("rope_type {other:?} is not supported; supported: default, linear, llama3")
            }
        })
    };
    let scaling = parse().with_context(|| format!("\"{section}\""))?;
    Ok((rope.number("rope_theta")?.or(theta).unwrap_or(10_000.0), scaling))
}

/// Each layer's attention window.
fn sliding_window(keys: &Keys, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    // MistralConfig's default is a window of 4096; a null turns it off
    let given = match architecture {
        Architecture::Mistral if keys.0.get("sliding_window").is_none() => Some(4096),
        _ => keys.optional_size("sliding_window")?,
    };
    if let Some(types) = keys.get("layer_types") {
        let types = types.as_array().filter(|list| list.len() == layers).with_context(|| {
            format!("\"layer_types\": expected a list with an entry for each of the {layers} layers")
        })?;
        let window = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => given
                .map(Some)
                .context("\"layer_types\" has sliding layers but \"sliding_window\" is not set"),
            _ => bail!("\"layer_types\": expected full_attention or sliding_attention, found {kind}"),
        };
        return types.iter().map(window).collect();
    }
    let first = match architecture {
        Architecture::Mistral => 0,
        Architecture::Qwen2 | Architecture::Qwen3 if keys.flag("use_sliding_window")? => {
            keys.optional_count("max_window_layers")?.unwrap_or(28)
        }
        _ => layers,
    };
    Ok((0..layers).map(|layer| given.filter(|_| layer >= first)).collect())
}

/// Typed access to a JSON object's keys; null counts as absent.
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn parse<T>(&self, key: &str, expected: &str, parse: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(found) = self.get(key) else { return Ok(None) };
        parse(found).map(Some).with_context(|| format!("\"{key}\": expected {expected}, found {found}"))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        self.parse(key, "a whole number", |v| v.as_u64().filter(|&n| n <= MAX_DIMENSION).map(|n| n as usize))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let expected = format!("a whole number from 1 to {MAX_DIMENSION}");
        self.parse(key, &expected, |v| {
            v.as_u64().filter(|n| (1..=MAX_DIMENSION).contains(n)).map(|n| n as usize)
        })
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.with_context(|| format!("\"{key}\" is missing"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.parse(key, "a number above 0", |v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.parse(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.parse(key, "a token id or a list of token ids", |v| match v.as_array() {
            Some(list) => list.iter().map(id).collect(),
            None => id(v).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Only what no default can stand in for, and `keys`.
    fn parse(architecture: &str, keys: Value) -> Result<ModelConfig> {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 32,
        });
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(&config)
    }

    #[test]
    fn absent_keys_take_the_architectures_defaults() {
        let llama = parse("LlamaForCausalLM", json!({})).unwrap();
        assert_eq!((llama.head_dim, llama.num_key_value_heads, llama.rope_theta), (16, 4, 10_000.0));
        assert_eq!((llama.max_position_embeddings, llama.rms_norm_eps), (2048, 1e-6));
        assert_eq!(
            (llama.qkv_bias, llama.o_bias, llama.qk_norm, llama.tie_word_embeddings),
            (false, false, false, false)
        );
        assert_eq!(llama.sliding_window, [None; 4]);
        assert_eq!((llama.bos_token_id, llama.eos_token_ids), (None, vec![]));

        let mistral = parse("MistralForCausalLM", json!({ "head_dim": null })).unwrap();
        assert_eq!((mistral.head_dim, mistral.sliding_window), (16, vec![Some(4096); 4]));

        let qwen2 = parse("Qwen2ForCausalLM", json!({ "sliding_window": 8 })).unwrap();
        assert_eq!((qwen2.head_dim, qwen2.qkv_bias, qwen2.o_bias), (16, true, false));
        assert_eq!(qwen2.sliding_window, [None; 4], "use_sliding_window is off");

        let qwen3 = parse("Qwen3ForCausalLM", json!({})).unwrap();
        assert_eq!((qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias), (128, true, false));
    }

    #[test]
    fn attention_bias_covers_the_output_projection() {
        for (architecture, expected) in
            [("LlamaForCausalLM", true), ("Qwen3ForCausalLM", true), ("MistralForCausalLM", false)]
        {
            let config = parse(architecture, json!({ "attention_bias": true })).unwrap();
            assert_eq!((config.qkv_bias, config.o_bias), (expected, expected), "{architecture}");
        }
    }

    #[test]
    fn windows_belong_to_layers() {
        let windows = |architecture, keys| parse(architecture, keys).unwrap().sliding_window;
        assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": 8 })), [Some(8); 4]);
        assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": null })), [None; 4]);
        let qwen = json!({ "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2 });
        assert_eq!(windows("Qwen2ForCausalLM", qwen), [None, None, Some(8), Some(8)]);
        let types = json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
        let listed = json!({ "layer_types": types, "sliding_window": 8 });
        assert_eq!(windows("Qwen3ForCausalLM", listed), [None, Some(8), None, Some(8)]);
        let error = parse("Qwen3ForCausalLM", json!({ "layer_types": types })).unwrap_err();
        assert!(error.to_string().contains("\"sliding_window\" is not set"), "{error}");
    }

    #[test]
    fn rope_is_read_from_old_and_new_keys() {
        let rope = |keys| {
            let config = parse("LlamaForCausalLM", keys).unwrap();
            (config.rope_theta, config.rope_scaling)
        };
        assert_eq!(rope(json!({ "rope_scaling": null, "rope_theta": 5e5 })), (5e5, None));
        assert_eq!(
            rope(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } })),
            (1e4, Some(RopeScaling::Linear(2.0)))
        );
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5
        });
        let expected = Llama3Rope {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        assert_eq!(
            rope(json!({ "rope_parameters": llama3 })),
            (5e5, Some(RopeScaling::Llama3(expected.clone())))
        );
        assert_eq!(
            rope(json!({ "rope_scaling": llama3, "rope_theta": 1e6 })),
            (5e5, Some(RopeScaling::Llama3(expected)))
        );
        assert_eq!(
            rope(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 7.0 } })),
            (7.0, None)
        );
    }

    #[test]
    fn token_ids_come_alone_or_in_lists() {
        let config = parse("LlamaForCausalLM", json!({ "bos_token_id": 1, "eos_token_id": [2, 3] })).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 3]));
        let config = parse("LlamaForCausalLM", json!({ "bos_token_id": null, "eos_token_id": 2 })).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
    }
}

//! Hugging Face's config.json of a decoder-only language model, dense or DynaMoE: the one reader of it, for the trainer
//! and for the engine's plugin.
//!
//! What a key means, and what its absence means, follows transformers. [`engine`] writes the same configuration again
//! for mistral.rs.

pub mod engine;
mod json;
mod keys;
mod rope;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use dynamoe::HiddenAct;
use dynamoe::config::DynaMoeConfig;
use serde_json::Value;

use crate::files::read_text;

pub use json::{parse, remove_not_finite};
use keys::Keys;
pub use rope::{Llama3Rope, RopeScaling, YarnRope};

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
    /// The FFN's matrices carry biases: dense Llamas only. Only the bias of `down_proj` is computed; the others have to be
    /// zero, as in a slice of a DynaMoE model.
    pub mlp_bias: bool,
    /// RMS norms over the head dimension of q and k (Qwen3).
    pub qk_norm: bool,
    /// The activation of the FFN's gate.
    pub hidden_act: HiddenAct,
    /// For each layer: the attention window, none for full attention.
    pub sliding_window: Vec<Option<usize>>,
    /// `bos_token_id`, where the config has one.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`: none, one or several.
    pub eos_token_ids: Vec<u32>,
    /// `closing_token_id`: the token that ends a document, where training found out which one the model ends documents
    /// with. No other program reads this key.
    pub closing_token_id: Option<u32>,
    /// Our section, for a DynaMoE checkpoint.
    pub dynamoe: Option<DynaMoeConfig>,
}

/// Base architectures by their names in `architectures` and `model_type`.
const ARCHITECTURES: [(&str, &str, Architecture); 4] = [
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
];

/// Bounds that no model comes near; they keep a hostile config.json from asking for absurd allocations.
const MAX_DIMENSION: u64 = 1 << 28;
const MAX_LAYERS: usize = 10_000;

impl Architecture {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        ARCHITECTURES.into_iter().map(|(_, _, architecture)| architecture)
    }

    /// The name in config.json's `architectures`.
    pub fn name(self) -> &'static str {
        ARCHITECTURES.iter().find(|(_, _, a)| *a == self).map_or("", |(name, _, _)| name)
    }

    /// The name in config.json's `model_type`.
    pub fn model_type(self) -> &'static str {
        ARCHITECTURES.iter().find(|(_, _, a)| *a == self).map_or("", |(_, model_type, _)| model_type)
    }

    fn from_name(name: &str) -> Result<Self> {
        ARCHITECTURES.iter().find(|(known, _, _)| *known == name).map(|(_, _, a)| *a).with_context(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|(known, _, _)| *known).collect();
            format!(
                "architecture {name:?} is not supported; supported: {}, {}",
                known.join(", "),
                dynamoe::config::ARCHITECTURE
            )
        })
    }

    fn from_model_type(name: &str) -> Option<Self> {
        ARCHITECTURES.iter().find(|(_, known, _)| *known == name).map(|(_, _, a)| *a)
    }

    /// The architecture of a dense model, from `architectures`, or from `model_type` where that is absent.
    fn of_dense(keys: &Keys) -> Result<Self> {
        let model_type = keys.get("model_type").and_then(Value::as_str);
        let by_type = model_type.and_then(Self::from_model_type);
        let Some(name) = first_architecture(keys.0) else {
            let name = model_type.context(
                "neither \"architectures\" nor \"model_type\" says what the model is: expected a list with one name",
            )?;
            return by_type.with_context(|| format!("\"model_type\": {name:?} is not supported"));
        };
        // the name of a decoder that was saved without its output matrix
        let decoder = name.strip_suffix("Model").map(|family| format!("{family}ForCausalLM"));
        let found = match decoder.and_then(|name| Self::from_name(&name).ok()) {
            Some(found) => found,
            None => Self::from_name(name)?,
        };
        if let Some(other) = by_type.filter(|by_type| *by_type != found) {
            bail!("\"architectures\" says {name}, but \"model_type\" says {}", other.model_type());
        }
        Ok(found)
    }
}

/// `architectures[0]`, where there is one.
fn first_architecture(json: &Value) -> Option<&str> {
    json.pointer("/architectures/0").and_then(Value::as_str)
}

/// `dir/config.json`, keys in the file's order. A number that is not finite, as Python writes it, becomes the string of
/// its name; see [`remove_not_finite`].
///
/// # Errors
/// A missing file, one that is not a JSON object, or a PEFT adapter's folder.
pub fn read_json(dir: &Path) -> Result<Value> {
    let adapter = dir.join("adapter_config.json");
    if adapter.exists() {
        bail!(
            "{}: the folder holds a PEFT adapter, not a whole model: merge the adapter into its base model (PEFT's \
             merge_and_unload) and give the folder of the result; if the weights here are merged already, remove this \
             file",
            adapter.display()
        );
    }
    let path = dir.join("config.json");
    let text = read_text(&path).with_context(|| {
        format!("{}: cannot be read; a model is a folder with config.json and *.safetensors", path.display())
    })?;
    let value = parse(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
    ensure!(value.is_object(), "{}: expected a JSON object", path.display());
    Ok(value)
}

impl ModelConfig {
    /// Refuses biases of the FFN where something does not compute them.
    ///
    /// # Errors
    /// A model that has them.
    pub fn refuse_biases(&self, what: &str) -> Result<()> {
        ensure!(
            !self.mlp_bias,
            "config.json: \"mlp_bias\" true: {what} does not know biases of the FFN: use a model without, such as the one \
             that a slice was cut from"
        );
        Ok(())
    }

    /// `H_e` of every layer; a dense model has one expert.
    pub fn expert_widths(&self) -> Vec<usize> {
        self.dynamoe.as_ref().map_or_else(|| vec![self.intermediate_size], |d| d.expert_widths.clone())
    }

    /// `H_e / I` of each expert, ascending to 1.
    pub fn width_shares(&self) -> Vec<f64> {
        let full = self.intermediate_size as f64;
        self.expert_widths().into_iter().map(|width| width as f64 / full).collect()
    }

    /// Reads `dir/config.json`. `dir/generation_config.json` adds to its `eos_token_id`, and names `bos_token_id` if it does
    /// not.
    ///
    /// # Errors
    /// A missing or broken file, an unsupported architecture (the message lists those supported), an option
    /// that changes the computation and is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut config = Self::from_json(&read_json(dir)?)
            .with_context(|| dir.join("config.json").display().to_string())?;
        let path = dir.join("generation_config.json");
        let text = read_text(&path).unwrap_or_default();
        if let Ok(generation) = parse(&text) {
            let keys = Keys(&generation);
            let ids = |key| keys.token_ids(key).with_context(|| path.display().to_string());
            if config.bos_token_id.is_none() {
                config.bos_token_id = ids("bos_token_id")?.first().copied();
            }
            for id in ids("eos_token_id")? {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Reads a parsed config.json. Absent keys take the default of transformers' class for the architecture,
    /// but for token ids (absent means none) and `num_key_value_heads` (absent means `num_attention_heads`).
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_json(json: &Value) -> Result<Self> {
        let keys = Keys(json);
        let ours = first_architecture(json) == Some(dynamoe::config::ARCHITECTURE)
            || keys.get("model_type").and_then(Value::as_str) == Some(dynamoe::config::MODEL_TYPE);
        let dynamoe = ours.then(|| DynaMoeConfig::from_config_json(json)).transpose()?;
        let architecture = match &dynamoe {
            Some(section) => Architecture::from_name(&section.base_architecture)?,
            None => Architecture::of_dense(&keys)?,
        };
        refuse_unsupported(&keys)?;
        let hidden_act = hidden_act(&keys)?;
        if let Some(section) = &dynamoe {
            ensure!(
                section.hidden_act == hidden_act,
                "\"dynamoe\": \"hidden_act\" is {:?}, but the base's is {:?}: expected the same",
                section.hidden_act.name(),
                hidden_act.name()
            );
        }
        // the other architectures' FFNs have no biases, whatever this key says
        let mlp_bias = architecture == Architecture::Llama && keys.flag("mlp_bias")?.unwrap_or(false);
        ensure!(!(mlp_bias && ours), "\"mlp_bias\": DynaMoE FFNs have no biases, found true");

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
        let max_position_embeddings =
            keys.optional_size("max_position_embeddings")?.unwrap_or(default_positions);
        let (rope_theta, rope_scaling) = rope::read(&keys, max_position_embeddings)?;
        let attention_bias = matches!(architecture, Architecture::Llama | Architecture::Qwen3)
            && keys.flag("attention_bias")?.unwrap_or(false);
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim: head_dim(&keys, architecture, hidden_size, num_attention_heads)?,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            o_bias: attention_bias,
            mlp_bias,
            qk_norm: architecture == Architecture::Qwen3,
            hidden_act,
            sliding_window: sliding_window(&keys, architecture, num_hidden_layers)?,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
            closing_token_id: keys.token_ids("closing_token_id")?.first().copied(),
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
    let rotary = keys.number("partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(rotary == 1.0, "\"partial_rotary_factor\": only 1 is supported, found {rotary}");
    Ok(())
}

/// The activation of the FFN's gate.
fn hidden_act(keys: &Keys) -> Result<HiddenAct> {
    let Some(found) = keys.get("hidden_act") else { return Ok(HiddenAct::Silu) };
    found.as_str().and_then(HiddenAct::from_name).with_context(|| {
        let known = HiddenAct::ALL.map(|act| format!("{:?}", act.name()));
        format!("\"hidden_act\": only {} are supported, found {found}", known.join(" and "))
    })
}

/// Whether the activation that config.json names is one of ours.
fn has_known_activation(json: &Value) -> bool {
    hidden_act(&Keys(json)).is_ok()
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
        None if architecture == Architecture::Qwen3 && keys.is_absent("head_dim") => 128,
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

/// Each layer's attention window, none for full attention.
fn sliding_window(keys: &Keys, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    let given = keys.optional_size("sliding_window")?;
    match architecture {
        Architecture::Llama => return Ok(vec![None; layers]),
        // the default is a window of 4096; a null turns it off
        Architecture::Mistral => {
            let default = keys.is_absent("sliding_window").then_some(4096);
            return Ok(vec![given.or(default); layers]);
        }
        Architecture::Qwen2 | Architecture::Qwen3 => {}
    }
    let default = keys.is_absent("sliding_window").then_some(4096);
    let on = keys.flag("use_sliding_window")?.unwrap_or(false);
    let given = given.or(default).filter(|_| on);
    if let Some(types) = keys.get("layer_types") {
        let types = types.as_array().filter(|list| list.len() == layers).with_context(|| {
            format!("\"layer_types\": expected a list with an entry for each of the {layers} layers")
        })?;
        let window = |kind: &Value| {
            match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => given.map(Some).context(
                "\"layer_types\" has sliding layers, but \"sliding_window\" is not set or \"use_sliding_window\" is not true",
            ),
            _ => bail!("\"layer_types\": expected full_attention or sliding_attention, found {kind}"),
        }
        };
        return types.iter().map(window).collect();
    }
    let first = keys.optional_count("max_window_layers")?.unwrap_or(28);
    Ok((0..layers).map(|layer| given.filter(|_| layer >= first)).collect())
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
        let listed = json!({ "layer_types": types, "sliding_window": 8, "use_sliding_window": true });
        assert_eq!(windows("Qwen3ForCausalLM", listed.clone()), [None, Some(8), None, Some(8)]);
        // these two do not read the key
        assert_eq!(windows("MistralForCausalLM", listed.clone()), [Some(8); 4]);
        assert_eq!(windows("LlamaForCausalLM", listed), [None; 4]);
        let off = json!({ "layer_types": types, "sliding_window": 8 });
        let error = parse("Qwen3ForCausalLM", off).unwrap_err();
        assert!(error.to_string().contains("\"use_sliding_window\" is not true"), "{error}");
        let error = parse("Qwen2ForCausalLM", json!({ "layer_types": ["full_attention"] })).unwrap_err();
        assert!(error.to_string().contains("each of the 4 layers"), "{error}");
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
    fn of_two_sections_of_rope_the_older_name_wins() {
        let rope = |keys| {
            let config = parse("LlamaForCausalLM", keys).unwrap();
            (config.rope_theta, config.rope_scaling)
        };
        let newer = json!({ "rope_type": "default", "rope_theta": 7.0 });
        let linear = json!({ "rope_type": "linear", "factor": 8.0 });
        let both = json!({ "rope_parameters": newer, "rope_scaling": linear });
        assert_eq!(
            rope(both),
            (1e4, Some(RopeScaling::Linear(8.0))),
            "with the default theta, as in transformers"
        );
        assert_eq!(rope(json!({ "rope_parameters": newer, "rope_scaling": {} })), (7.0, None));
        assert_eq!(
            rope(json!({ "rope_parameters": newer, "rope_scaling": null, "rope_theta": 5.0 })),
            (7.0, None)
        );
        assert_eq!(rope(json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } })), (1e4, None));
        let error =
            parse("LlamaForCausalLM", json!({ "rope_scaling": { "rope_type": "longrope" } })).unwrap_err();
        assert!(format!("{error:#}").contains("\"longrope\" is not supported"), "{error:#}");
    }

    #[test]
    fn yarn_takes_its_defaults_from_the_model() {
        let yarn = |keys: Value| match parse("Qwen2ForCausalLM", json!({ "rope_scaling": keys }))
            .unwrap()
            .rope_scaling
        {
            Some(RopeScaling::Yarn(yarn)) => yarn,
            other => panic!("{other:?}"),
        };
        let plain = yarn(json!({ "type": "yarn", "factor": 4.0 }));
        let expected = YarnRope {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 32_768,
            truncate: true,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
        };
        assert_eq!(plain, expected);
        let scaled =
            json!({ "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false });
        let scaled = yarn(scaled);
        assert_eq!(scaled.attention_factor, (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0));
        assert!(!scaled.truncate);
        let ratio = json!({ "type": "yarn", "factor": null, "original_max_position_embeddings": 8192 });
        assert_eq!(yarn(ratio).factor, 4.0);
    }

    #[test]
    fn llama3s_original_positions_are_the_models_where_they_are_not_given() {
        let rope =
            json!({ "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
        let original = |keys: Value| match parse("LlamaForCausalLM", keys).unwrap().rope_scaling {
            Some(RopeScaling::Llama3(rope)) => rope.original_max_position_embeddings,
            other => panic!("{other:?}"),
        };
        assert_eq!(original(json!({ "rope_scaling": rope })), 2048);
        assert_eq!(original(json!({ "rope_scaling": rope, "original_max_position_embeddings": 99 })), 99);
    }

    #[test]
    fn the_model_type_stands_in_for_absent_architectures() {
        let architecture = |keys: Value| parse("MistralForCausalLM", keys).map(|config| config.architecture);
        for architectures in [Value::Null, json!([]), json!(["MistralModel"])] {
            let keys = json!({ "architectures": architectures, "model_type": "mistral" });
            assert_eq!(architecture(keys).unwrap(), Architecture::Mistral);
        }
        let error = |keys| architecture(keys).unwrap_err().to_string();
        assert!(error(json!({ "model_type": "llama" })).contains("says MistralForCausalLM"));
        assert!(
            error(json!({ "architectures": null })).contains("neither \"architectures\" nor \"model_type\"")
        );
        assert!(
            error(json!({ "architectures": null, "model_type": "gpt2" }))
                .contains("\"gpt2\" is not supported")
        );
    }

    #[test]
    fn keys_of_other_architectures_are_not_read() {
        let swish = parse("LlamaForCausalLM", json!({ "hidden_act": "swish" }));
        assert!(swish.is_ok());
        assert!(!parse("MistralForCausalLM", json!({ "mlp_bias": true })).unwrap().mlp_bias);
        let biased = parse("LlamaForCausalLM", json!({ "mlp_bias": true })).unwrap();
        assert!(biased.mlp_bias && biased.refuse_biases("training").is_err());
        assert!(parse("LlamaForCausalLM", json!({})).unwrap().refuse_biases("training").is_ok());
        let windowless =
            json!({ "use_sliding_window": true, "max_window_layers": 0, "max_position_embeddings": 8 });
        assert_eq!(parse("Qwen2ForCausalLM", windowless).unwrap().sliding_window, [Some(4096); 4]);
    }

    #[test]
    fn the_section_names_the_activation_of_the_base() {
        let section = |version: u32, keys: Value| {
            let mut section = json!({
                "version": version, "base_architecture": "LlamaForCausalLM", "base_model_type": "llama",
                "expert_widths": [48, 96], "router": { "kind": "static", "hidden_size": 0 }, "sensitivity": 0.5,
            });
            section.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            let keys = json!({
                "architectures": ["DynaMoeForCausalLM"], "dynamoe": section, "hidden_act": "gelu_pytorch_tanh"
            });
            parse("DynaMoeForCausalLM", keys)
        };
        let error = |found: Result<ModelConfig>| format!("{:#}", found.unwrap_err());
        let gelu = json!({ "hidden_act": "gelu_pytorch_tanh" });
        assert_eq!(section(3, gelu.clone()).unwrap().hidden_act, HiddenAct::GeluTanh);
        let other = error(section(3, json!({})));
        assert!(other.contains("\"silu\"") && other.contains("\"gelu_pytorch_tanh\""), "{other}");
        let older = error(section(2, gelu));
        assert!(older.contains("hidden_act needs version 3") && older.contains("found version 2"), "{older}");
    }

    #[test]
    fn token_ids_come_alone_or_in_lists() {
        let config = parse("LlamaForCausalLM", json!({ "bos_token_id": 1, "eos_token_id": [2, 3] })).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 3]));
        let config = parse("LlamaForCausalLM", json!({ "bos_token_id": null, "eos_token_id": 2 })).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
        let config =
            parse("LlamaForCausalLM", json!({ "bos_token_id": -1, "eos_token_id": [-1, 2] })).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
    }

    #[test]
    fn token_ids_may_stand_in_generation_config() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "vocab_size": 32, "eos_token_id": 5,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let generation = r#"{"bos_token_id": 1, "eos_token_id": [2, 5, 3], "top_p": NaN}"#;
        std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        let config = ModelConfig::read(dir.path()).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![5, 2, 3]));
    }

    #[test]
    fn an_adapter_is_called_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
        let error = read_json(dir.path()).unwrap_err().to_string();
        assert!(error.contains("PEFT adapter") && error.contains("merge_and_unload"), "{error}");
    }
}

//! What mistral.rs 0.8.1, with our patches, can compute of the models that we know, and how to say it in a config.json
//! that it understands.
//!
//! The engine reads config.json into one struct for each architecture. It needs some keys that Hugging Face leaves out,
//! and it ignores others that change the computation. So what it is given is never a checkpoint's own text, but
//! [`for_engine`]'s: every key explicit, or a [`Refusal`] that names the key.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use dynamoe::config::DynaMoeConfig;
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling, has_known_activation};

/// What one of the engine's models computes.
struct Engine {
    architecture: Architecture,
    /// Rescalings of rotary frequencies, besides none.
    rope: &'static [&'static str],
    /// Whether a head may have another size than `hidden_size / num_attention_heads`.
    head_dim: bool,
    /// Biases of q, k and v, and of the output projection: all that it can do.
    biases: &'static [[bool; 2]],
    qk_norm: bool,
    windows: Windows,
}

/// Which layers may have a window.
#[derive(PartialEq)]
enum Windows {
    None,
    All,
    Any,
}

/// The table: one row for each of the engine's models.
const ENGINES: [Engine; 4] = [
    Engine {
        architecture: Architecture::Llama,
        rope: &["linear", "llama3"],
        head_dim: false,
        biases: &[[false, false], [true, true]],
        qk_norm: false,
        windows: Windows::None,
    },
    Engine {
        architecture: Architecture::Mistral,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false]],
        qk_norm: false,
        windows: Windows::All,
    },
    Engine {
        architecture: Architecture::Qwen2,
        rope: &["linear", "llama3", "yarn"],
        head_dim: false,
        biases: &[[true, false]],
        qk_norm: false,
        windows: Windows::Any,
    },
    Engine {
        architecture: Architecture::Qwen3,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false], [true, true]],
        qk_norm: true,
        windows: Windows::Any,
    },
];

/// Bases that the engine's plugin loads and the trainer does not know.
const ENGINE_ONLY: [&str; 3] = ["GemmaForCausalLM", "Gemma2ForCausalLM", "SmolLM3ForCausalLM"];

/// A key of config.json that changes what the model computes, and that the engine does not honour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The key.
    pub key: &'static str,
    /// What the model means by it, its default where it is absent.
    pub found: String,
    /// Why the engine does not honour it.
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" {}: {}", self.key, self.found, self.reason)
    }
}

/// The architectures, by their names in `architectures`, whose DynaMoE models the engine's plugin loads.
pub fn bases() -> Vec<&'static str> {
    Architecture::all().map(Architecture::name).chain(ENGINE_ONLY).collect()
}

/// What keeps the engine from computing this model, as far as config.json tells; nothing if it can be served.
pub fn refusals(config: &ModelConfig) -> Vec<Refusal> {
    match choose(config) {
        Ok(_) => Vec::new(),
        Err(refusals) => refusals,
    }
}

/// The config.json of the dense model in a DynaMoE model's, as the engine understands it.
///
/// # Errors
/// As [`ModelConfig::from_json`]; the keys that the engine does not honour, by name and value.
pub fn for_engine(json: &Value) -> Result<Value> {
    if let Some(name) = engine_only(json) {
        return pass_on(json, name);
    }
    let config = ModelConfig::from_json(json)?;
    match choose(&config) {
        Ok(engine) => Ok(engine.config(&config)),
        Err(refusals) => bail!("{}", describe(&refusals)),
    }
}

/// The same of a dense model's config.json. The engine reads two keys of dense models by itself: quantized weights, and
/// other activations.
///
/// # Errors
/// As [`for_engine`].
pub fn dense_for_engine(json: &Value) -> Result<Value> {
    let mut known = json.clone();
    let map = known.as_object_mut().context("config.json: expected an object")?;
    let mut kept = vec![("quantization_config", map.shift_remove("quantization_config"))];
    if !has_known_activation(json) {
        kept.push(("hidden_act", map.shift_remove("hidden_act")));
    }
    let mut rewritten = for_engine(&known)?;
    for (key, found) in kept {
        if let Some(found) = found.filter(|found| !found.is_null()) {
            rewritten[key] = found;
        }
    }
    Ok(rewritten)
}

/// One line that names all keys.
pub fn describe(refusals: &[Refusal]) -> String {
    let list: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    format!("config.json: mistral.rs cannot compute this model: {}", list.join("; "))
}

/// The engine's model that computes this one: that of its own architecture, or another one with the same tensors.
fn choose(config: &ModelConfig) -> Result<&'static Engine, Vec<Refusal>> {
    let own = ENGINES.iter().find(|engine| engine.architecture == config.architecture);
    let refusals = own.expect("the table has a row for each architecture").refusals(config);
    let able = |engine: &&Engine| engine.refusals(config).is_empty();
    if refusals.is_empty() { own } else { ENGINES.iter().find(able) }.ok_or(refusals)
}

impl Engine {
    fn refusals(&self, config: &ModelConfig) -> Vec<Refusal> {
        let name = self.architecture.name();
        let mut refusals = Vec::new();
        let mut refuse = |key, found: String, reason: &str| {
            refusals.push(Refusal { key, found, reason: format!("its {name} {reason}") });
        };
        if !self.biases.contains(&[config.qkv_bias, config.o_bias]) {
            refuse("attention_bias", config.o_bias.to_string(), "has other biases");
        }
        if config.mlp_bias {
            refuse("mlp_bias", "true".to_owned(), "has no biases in its FFNs");
        }
        if config.qk_norm != self.qk_norm {
            refuse("model_type", config.architecture.model_type().to_owned(), "norms q and k differently");
        }
        let head_dim = config.head_dim * config.num_attention_heads == config.hidden_size;
        if !(self.head_dim || head_dim) {
            let reason = "takes hidden_size / num_attention_heads";
            refuse("head_dim", config.head_dim.to_string(), reason);
        }
        if let Some(scaling) = &config.rope_scaling
            && !self.rope.contains(&scaling.name())
        {
            let reason = format!("knows the types default, dynamic, {} only", self.rope.join(", "));
            refuse("rope_scaling", format!("of type {:?}", scaling.name()), &reason);
        }
        let windows = windows(config);
        let known = match self.windows {
            Windows::None => windows.iter().all(Option::is_none),
            Windows::All => windows.iter().all(|window| *window == windows[0]),
            Windows::Any => true,
        };
        if let Some(window) = windows.iter().flatten().next()
            && !known
        {
            refuse("sliding_window", window.to_string(), "has no window in these layers");
        }
        refusals
    }

    /// A config.json that says all that this model's struct reads.
    fn config(&self, config: &ModelConfig) -> Value {
        let windows = windows(config);
        let kind = |window: &Option<usize>| match window {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        let window = windows.iter().flatten().next();
        json!({
            "architectures": [self.architecture.name()],
            "model_type": self.architecture.model_type(),
            "hidden_act": config.hidden_act.name(),
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": config.rope_scaling.as_ref().map(rope_scaling),
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
            "sliding_window": window,
            "use_sliding_window": window.is_some(),
            "max_window_layers": config.num_hidden_layers,
            "layer_types": windows.iter().map(kind).collect::<Vec<_>>(),
            "attention_bias": config.o_bias,
        })
    }
}

/// The windows of the layers, without those that are never full.
fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    let positions = config.max_position_embeddings;
    config.sliding_window.iter().map(|window| window.filter(|&window| window < positions)).collect()
}

/// As the engine's structs read it.
fn rope_scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear(factor) => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3(rope) => json!({
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }),
        RopeScaling::Yarn(rope) => json!({
            "rope_type": "yarn",
            "factor": rope.factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }),
    }
}

/// The base architecture of a DynaMoE model, if the trainer does not know it.
fn engine_only(json: &Value) -> Option<&'static str> {
    let name = json.pointer("/dynamoe/base_architecture").and_then(Value::as_str)?;
    ENGINE_ONLY.into_iter().find(|known| *known == name)
}

/// The config.json of a base that the trainer does not know: the checkpoint's own, without the `dynamoe` section and
/// with rotary embeddings where the engine looks for them.
fn pass_on(json: &Value, name: &str) -> Result<Value> {
    let section = DynaMoeConfig::from_config_json(json)?;
    let mut json = json.clone();
    json["architectures"] = json!([name]);
    json["model_type"] = section.base_model_type.into();
    let map = json.as_object_mut().context("config.json: expected an object")?;
    map.shift_remove("dynamoe");
    if let Some(mut rope) = map.shift_remove("rope_parameters").filter(Value::is_object) {
        if let Some(theta) = rope.as_object_mut().and_then(|rope| rope.shift_remove("rope_theta")) {
            map.insert("rope_theta".into(), theta);
        }
        map.entry("rope_scaling").or_insert(rope);
    }
    let kind = |rope: &Value| rope.get("rope_type").or(rope.get("type")).cloned().unwrap_or_default();
    let kind = map.get("rope_scaling").filter(|rope| !rope.is_null()).map(kind);
    let known: &[&str] =
        if name == "SmolLM3ForCausalLM" { &["default", "linear", "llama3"] } else { &["default"] };
    if let Some(kind) = kind {
        ensure!(
            kind.as_str().is_some_and(|kind| known.contains(&kind)),
            "config.json: \"rope_scaling\" of type {kind}: mistral.rs's {name} knows the types {} only",
            known.join(", ")
        );
    }
    let unread: &[&str] = if name == "SmolLM3ForCausalLM" {
        &["attention_bias", "mlp_bias", "use_sliding_window"]
    } else {
        &[]
    };
    if let Some(key) = unread.iter().find(|key| map.get(**key) == Some(&Value::Bool(true))) {
        bail!("config.json: \"{key}\" true: mistral.rs's {name} does not know it");
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of `architecture` with `keys` besides what no default can stand in for.
    fn model(architecture: Architecture, keys: Value) -> Value {
        let mut config = json!({
            "architectures": [architecture.name()], "model_type": architecture.model_type(),
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32, "max_position_embeddings": 512,
        });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        config
    }

    #[test]
    fn every_key_that_the_engine_needs_is_explicit() {
        for engine in &ENGINES {
            let rewritten = for_engine(&model(engine.architecture, json!({}))).unwrap();
            assert_eq!(rewritten["architectures"], json!([engine.architecture.name()]));
            assert_eq!((&rewritten["rope_theta"], &rewritten["rms_norm_eps"]), (&json!(1e4), &json!(1e-6)));
            assert_eq!(for_engine(&rewritten).unwrap(), rewritten, "rewriting is done once");
        }
        let newer = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}});
        let rewritten = for_engine(&model(Architecture::Llama, newer)).unwrap();
        let scaling = json!({"rope_type": "linear", "factor": 2.0});
        assert_eq!((&rewritten["rope_theta"], &rewritten["rope_scaling"]), (&json!(500.0), &scaling));
    }

    #[test]
    fn windows_are_said_layer_by_layer() {
        let keys = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3});
        let rewritten = for_engine(&model(Architecture::Qwen2, keys)).unwrap();
        let full = "full_attention";
        assert_eq!(rewritten["layer_types"], json!([full, full, full, "sliding_attention"]));
        assert_eq!(
            (&rewritten["sliding_window"], &rewritten["use_sliding_window"]),
            (&json!(8), &json!(true))
        );
        // one that no prompt can fill
        let rewritten = for_engine(&model(Architecture::Mistral, json!({"sliding_window": 512}))).unwrap();
        assert_eq!(rewritten["sliding_window"], Value::Null);
    }

    #[test]
    fn another_model_of_the_engine_with_the_same_tensors_stands_in() {
        let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}});
        for keys in [json!({"head_dim": 24}), yarn] {
            let rewritten = for_engine(&model(Architecture::Llama, keys)).unwrap();
            assert_eq!(rewritten["architectures"], json!(["MistralForCausalLM"]));
            assert_eq!(rewritten["sliding_window"], Value::Null);
        }
    }

    #[test]
    fn what_the_engine_does_not_honour_is_refused_by_key_and_value() {
        for (architecture, keys, key, value) in [
            (Architecture::Qwen2, json!({"head_dim": 24}), "head_dim", "24"),
            (Architecture::Llama, json!({"attention_bias": true, "head_dim": 24}), "head_dim", "24"),
            (
                Architecture::Llama,
                json!({"attention_bias": true, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                "rope_scaling",
                "yarn",
            ),
        ] {
            let error = for_engine(&model(architecture, keys)).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{key}\"")) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn a_dense_model_keeps_what_the_engine_reads_by_itself() {
        let keys = json!({"hidden_act": "gelu", "quantization_config": {"quant_method": "gptq"}});
        let json = model(Architecture::Llama, keys);
        assert!(for_engine(&json).is_err());
        let rewritten = dense_for_engine(&json).unwrap();
        assert_eq!((&rewritten["hidden_act"], &rewritten["rope_theta"]), (&json!("gelu"), &json!(1e4)));
        assert_eq!(rewritten["quantization_config"], json["quantization_config"]);
        let error = dense_for_engine(&model(Architecture::Llama, json!({"mlp_bias": true}))).unwrap_err();
        assert!(error.to_string().contains("\"mlp_bias\""), "{error}");
    }
}

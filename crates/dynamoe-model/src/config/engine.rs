//! What mistral.rs 0.8.1 can compute of the models that we know, and how to say it in a config.json that it understands.
//!
//! The engine reads config.json into one struct for each architecture. It needs some keys that Hugging Face leaves out,
//! and it ignores others that change the computation. So what it is given is never a checkpoint's own text, but
//! [`for_engine`]'s: every key explicit, or a [`Refusal`] that names the key.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use dynamoe::config::DynaMoeConfig;
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling};

/// What one of the engine's models computes.
struct Engine {
    architecture: Architecture,
    /// Rescalings of rotary frequencies, besides none.
    rope: &'static [&'static str],
    /// Whether a head may have another size than `hidden_size / num_attention_heads`.
    head_dim: bool,
    /// Biases of q, k and v, and of the output projection.
    biases: [bool; 2],
    qk_norm: bool,
    /// Keys that its struct reads, besides [`COMMON`].
    reads: &'static [&'static str],
}

/// The table: one row for each of the engine's models.
const ENGINES: [Engine; 4] = [
    Engine {
        architecture: Architecture::Llama,
        rope: &["linear", "llama3"],
        head_dim: false,
        biases: [false, false],
        qk_norm: false,
        reads: &["rope_scaling"],
    },
    Engine {
        architecture: Architecture::Mistral,
        rope: &[],
        head_dim: true,
        biases: [false, false],
        qk_norm: false,
        reads: &["head_dim", "sliding_window"],
    },
    Engine {
        architecture: Architecture::Qwen2,
        rope: &[],
        head_dim: false,
        biases: [true, false],
        qk_norm: false,
        reads: &["sliding_window"],
    },
    Engine {
        architecture: Architecture::Qwen3,
        rope: &[],
        head_dim: true,
        biases: [false, false],
        qk_norm: true,
        reads: &["head_dim", "sliding_window", "use_sliding_window", "max_window_layers"],
    },
];

/// Keys that all of the engine's structs read.
const COMMON: [&str; 11] = [
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
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

/// The config.json of the dense model in `json` (a dense or a DynaMoE model's) as the engine understands it.
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

/// Where the engine, given a dense model's config.json as it is, computes something else than the model: one sentence
/// for each key. Nothing for architectures that we do not know.
pub fn misread(json: &Value) -> Vec<String> {
    let Ok(config) = ModelConfig::from_json(json) else { return Vec::new() };
    let engine = match choose(&config) {
        Ok(engine) => engine,
        Err(refusals) => return refusals.iter().map(Refusal::to_string).collect(),
    };
    let own = Engine::of(config.architecture);
    let mut found: Vec<String> = own.refusals(&config).iter().map(Refusal::to_string).collect();
    let wanted = engine.config(&config);
    for key in COMMON.iter().chain(own.reads) {
        let (raw, wanted) = (own.raw(&config, json, key), &wanted[*key]);
        if !same(&raw, wanted) {
            let raw = if raw.is_null() { "no value".to_owned() } else { raw.to_string() };
            found.push(format!("\"{key}\": mistral.rs reads {raw}, the model means {wanted}"));
        }
    }
    found
}

/// One line that names all keys.
pub fn describe(refusals: &[Refusal]) -> String {
    let list: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    format!("config.json: mistral.rs cannot compute this model: {}", list.join("; "))
}

/// The engine's model that computes this one: that of its own architecture, or another one with the same tensors.
fn choose(config: &ModelConfig) -> Result<&'static Engine, Vec<Refusal>> {
    let own = Engine::of(config.architecture);
    let refusals = own.refusals(config);
    if refusals.is_empty() {
        return Ok(own);
    }
    ENGINES.iter().find(|engine| engine.refusals(config).is_empty()).ok_or(refusals)
}

impl Engine {
    fn of(architecture: Architecture) -> &'static Self {
        let position = ENGINES.iter().position(|engine| engine.architecture == architecture);
        &ENGINES[position.expect("the table has a row for each architecture")]
    }

    fn refusals(&self, config: &ModelConfig) -> Vec<Refusal> {
        let name = self.architecture.name();
        let mut refusals = Vec::new();
        let mut refuse = |key, found: String, reason: &str| {
            refusals.push(Refusal { key, found, reason: format!("its {name} {reason}") });
        };
        if [config.qkv_bias, config.o_bias] != self.biases {
            let always = if self.biases[0] { "always has biases of q, k and v" } else { "has no biases" };
            refuse("attention_bias", config.o_bias.to_string(), always);
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
            let reason = match self.rope {
                [] => "does not rescale rotary frequencies".to_owned(),
                known => format!("knows the types default, {} only", known.join(", ")),
            };
            refuse("rope_scaling", format!("of type {:?}", scaling.name()), &reason);
        }
        let positions = config.max_position_embeddings;
        if let Some(window) = config.sliding_window.iter().flatten().find(|window| **window < positions) {
            let reason = format!(
                "computes other windows (set \"max_position_embeddings\" to {window} or less to serve without them)"
            );
            refuse("sliding_window", window.to_string(), &reason);
        }
        refusals
    }

    /// A config.json that says all that this model's struct reads.
    fn config(&self, config: &ModelConfig) -> Value {
        json!({
            "architectures": [self.architecture.name()],
            "model_type": self.architecture.model_type(),
            "hidden_act": "silu",
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
            "sliding_window": null,
            "use_sliding_window": false,
            "max_window_layers": config.num_hidden_layers,
            "attention_bias": config.o_bias,
        })
    }

    /// What this model's struct would find at `key` in the checkpoint's own text.
    fn raw(&self, config: &ModelConfig, json: &Value, key: &str) -> Value {
        let found = json.get(key).filter(|found| !found.is_null());
        match (key, found) {
            ("head_dim", None) => (config.hidden_size / config.num_attention_heads).into(),
            ("rope_theta", _) if self.architecture == Architecture::Mistral => {
                let newer = json.pointer("/rope_parameters/rope_theta");
                newer.or(found).cloned().unwrap_or_else(|| 10_000.0.into())
            }
            ("tie_word_embeddings", None) => false.into(),
            (_, found) => found.cloned().unwrap_or_default(),
        }
    }
}

/// Whether the engine reads the same from both.
fn same(raw: &Value, wanted: &Value) -> bool {
    match (raw, wanted) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Object(raw), Value::Object(wanted)) => {
            wanted.iter().all(|(key, wanted)| raw.get(key).is_some_and(|raw| same(raw, wanted)))
        }
        (Value::String(act), Value::String(_)) => matches!(act.as_str(), "silu" | "swish"),
        _ => raw == wanted,
    }
}

/// As the engine's Llama reads it.
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
        RopeScaling::Yarn(rope) => json!({"rope_type": "yarn", "factor": rope.factor}),
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
            let rewritten = for_engine(&model(engine.architecture, json!({"sliding_window": null}))).unwrap();
            assert_eq!(rewritten["architectures"], json!([engine.architecture.name()]));
            assert_eq!((&rewritten["rope_theta"], &rewritten["rms_norm_eps"]), (&json!(1e4), &json!(1e-6)));
            for key in COMMON.iter().chain(engine.reads) {
                assert!(rewritten.get(key).is_some(), "{key}");
            }
        }
        let newer = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}});
        let rewritten = for_engine(&model(Architecture::Llama, newer)).unwrap();
        let scaling = json!({"rope_type": "linear", "factor": 2.0});
        assert_eq!((&rewritten["rope_theta"], &rewritten["rope_scaling"]), (&json!(500.0), &scaling));
    }

    #[test]
    fn another_model_of_the_engine_with_the_same_tensors_stands_in() {
        let wide = for_engine(&model(Architecture::Llama, json!({"head_dim": 24}))).unwrap();
        assert_eq!((&wide["architectures"], &wide["head_dim"]), (&json!(["MistralForCausalLM"]), &json!(24)));
        let linear = json!({"sliding_window": null, "rope_scaling": {"type": "linear", "factor": 2.0}});
        let scaled = for_engine(&model(Architecture::Mistral, linear)).unwrap();
        assert_eq!(scaled["architectures"], json!(["LlamaForCausalLM"]));
    }

    #[test]
    fn what_the_engine_ignores_is_refused_by_key_and_value() {
        let linear = json!({"rope_type": "linear", "factor": 2.0});
        for (architecture, keys, key, value) in [
            (Architecture::Llama, json!({"attention_bias": true}), "attention_bias", "true"),
            (Architecture::Qwen3, json!({"attention_bias": true}), "attention_bias", "true"),
            (Architecture::Mistral, json!({"sliding_window": 32}), "sliding_window", "32"),
            (Architecture::Mistral, json!({"max_position_embeddings": 8192}), "sliding_window", "4096"),
            (Architecture::Qwen2, json!({"rope_scaling": linear}), "rope_scaling", "linear"),
            (Architecture::Qwen2, json!({"head_dim": 24}), "head_dim", "24"),
            (Architecture::Llama, json!({"rope_scaling": linear, "head_dim": 24}), "head_dim", "24"),
            (
                Architecture::Llama,
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                "rope_scaling",
                "yarn",
            ),
        ] {
            let error = for_engine(&model(architecture, keys)).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{key}\"")) && error.contains(value), "{error}");
        }
        let window =
            |layers| json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": layers});
        assert!(for_engine(&model(Architecture::Qwen3, window(4))).is_ok(), "no layer has a window");
        assert!(for_engine(&model(Architecture::Qwen3, window(3))).is_err());
    }

    #[test]
    fn a_dense_models_own_text_is_misread_where_it_leaves_keys_out() {
        let told = |architecture, keys| misread(&model(architecture, keys)).join("\n");
        let explicit = json!({"hidden_act": "silu", "rope_theta": 1e4, "rms_norm_eps": 1e-6});
        assert_eq!(told(Architecture::Llama, explicit.clone()), "");
        let mut qwen = explicit.clone();
        qwen["sliding_window"] = 32.into();
        assert!(told(Architecture::Qwen2, qwen.clone()).contains("\"sliding_window\": mistral.rs reads 32"));
        assert_eq!(told(Architecture::Llama, qwen), "", "Llama has no windows, whatever the key says");
        let mut newer = explicit.clone();
        newer.as_object_mut().unwrap().shift_remove("rope_theta");
        newer["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        newer["sliding_window"] = Value::Null;
        assert!(told(Architecture::Llama, newer.clone()).contains("reads no value, the model means 500000"));
        assert_eq!(told(Architecture::Mistral, newer), "");
        let mut wide = explicit;
        wide["head_dim"] = 24.into();
        assert!(told(Architecture::Llama, wide).contains("\"head_dim\" 24"));
    }
}

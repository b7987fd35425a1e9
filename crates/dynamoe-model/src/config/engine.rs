//! What mistral.rs 0.8.1, with our patches, can compute of the models that we know, and how to say it in a config.json
//! that it understands.
//!
//! The engine reads config.json into one struct for each architecture. It needs some keys that Hugging Face leaves out,
//! and it ignores others that change the computation. So what it is given is never a checkpoint's own text, but
//! [`for_engine`]'s: every key explicit, or a [`Refusal`] that names the key.

use std::fmt;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling, Scales, has_known_activation};

/// What one of the engine's models computes.
struct Engine {
    architecture: Architecture,
    /// Rescalings of rotary frequencies, besides none.
    rope: &'static [&'static str],
    /// Whether a head may have another size than `hidden_size / num_attention_heads`.
    head_dim: bool,
    /// Biases of q, k and v, and of the output projection: all that it can do.
    biases: &'static [[bool; 2]],
    windows: Windows,
    /// Whether layers may leave q and k as they are.
    without_rope: bool,
}

/// Which layers may have a window.
#[derive(PartialEq)]
enum Windows {
    None,
    All,
    Any,
}

/// The table: one row for each of the engine's models. Norms are those of the architecture. With our patches, Llama
/// computes Granite, too, and Gemma 2 computes Gemma 3.
const ENGINES: [Engine; 7] = [
    Engine {
        architecture: Architecture::Llama,
        rope: &["linear", "llama3"],
        head_dim: false,
        biases: &[[false, false], [true, true]],
        windows: Windows::None,
        without_rope: false,
    },
    Engine {
        architecture: Architecture::Mistral,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false]],
        windows: Windows::All,
        without_rope: false,
    },
    Engine {
        architecture: Architecture::Qwen2,
        rope: &["linear", "llama3", "yarn"],
        head_dim: false,
        biases: &[[true, false]],
        windows: Windows::Any,
        without_rope: false,
    },
    Engine {
        architecture: Architecture::Qwen3,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false], [true, true]],
        windows: Windows::Any,
        without_rope: false,
    },
    Engine {
        architecture: Architecture::SmolLm3,
        rope: &["linear", "llama3"],
        head_dim: false,
        biases: &[[false, false]],
        windows: Windows::None,
        without_rope: true,
    },
    Engine {
        architecture: Architecture::Gemma,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false], [true, true]],
        windows: Windows::None,
        without_rope: false,
    },
    Engine {
        architecture: Architecture::Gemma2,
        rope: &["linear", "llama3", "yarn"],
        head_dim: true,
        biases: &[[false, false], [true, true]],
        windows: Windows::Any,
        without_rope: false,
    },
];

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
        kept.extend(["hidden_act", "hidden_activation"].map(|key| (key, map.shift_remove(key))));
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
    let meant = match config.architecture {
        Architecture::Granite => Architecture::Llama,
        Architecture::Gemma3 => Architecture::Gemma2,
        own => own,
    };
    let own = ENGINES.iter().find(|engine| engine.architecture == meant);
    let refusals = own.expect("the table has a row for each of these").refusals(config);
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
        let (model, own) = (config.architecture, self.architecture.family());
        let gemma3 = self.architecture == Architecture::Gemma2 && config.local_rope_theta.is_some();
        if [config.qk_norm, config.output_norms] != [own.qk_norm || gemma3, own.output_norms]
            || config.norm_offset != own.norm_offset
        {
            refuse("model_type", model.model_type().to_owned(), "has other norms");
        }
        if own.tied && own.norm_offset != 0.0 && !config.tie_word_embeddings {
            refuse("tie_word_embeddings", "false".to_owned(), "takes the embedding for the output matrix");
        }
        if !self.without_rope && config.rotary_layers.contains(&false) {
            refuse("no_rope_layers", "with a 0".to_owned(), "turns q and k in all layers");
        }
        let head_dim = config.head_dim * config.num_attention_heads == config.hidden_size;
        if !(self.head_dim || head_dim) {
            let reason = "takes hidden_size / num_attention_heads";
            refuse("head_dim", config.head_dim.to_string(), reason);
        }
        if let Some(scaling) = &config.rope_scaling
            && !self.rope.contains(&scaling.name())
        {
            let known = [&["default", "dynamic"][..], self.rope].concat().join(", ");
            let reason = format!("knows the types {known} only");
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
        refusals.extend(self.scales(config));
        refusals
    }

    /// Factors and caps that this model does not have.
    fn scales(&self, config: &ModelConfig) -> Vec<Refusal> {
        let (found, name) = (config.scales, self.architecture.name());
        let plain = Scales::plain(config.head_dim);
        let embedding = (config.hidden_size as f64).sqrt();
        let own = match self.architecture {
            Architecture::Llama => Scales { attention_cap: None, logit_cap: None, ..found },
            Architecture::Gemma => Scales { embedding, ..plain },
            Architecture::Gemma2 => {
                let attention = query_scalar(found).map_or(plain.attention, |_| found.attention);
                Scales { embedding, attention, residual: 1.0, logits: 1.0, ..found }
            }
            _ => plain,
        };
        let cap = |cap: Option<f64>| cap.map_or("null".to_owned(), |cap| cap.to_string());
        let granite = config.architecture == Architecture::Granite;
        let (embedding, attention) = match granite {
            true => ("embedding_multiplier", ("attention_multiplier", found.attention)),
            false => ("model_type", ("query_pre_attn_scalar", found.attention.powi(-2))),
        };
        let all = [
            (embedding, own.embedding == found.embedding, found.embedding.to_string()),
            (attention.0, own.attention == found.attention, attention.1.to_string()),
            ("residual_multiplier", own.residual == found.residual, found.residual.to_string()),
            ("logits_scaling", own.logits == found.logits, found.logits.recip().to_string()),
            ("attn_logit_softcapping", own.attention_cap == found.attention_cap, cap(found.attention_cap)),
            ("final_logit_softcapping", own.logit_cap == found.logit_cap, cap(found.logit_cap)),
        ];
        let refused = all.into_iter().filter(|(_, same, _)| !same);
        refused
            .map(|(key, _, found)| Refusal { key, found, reason: format!("its {name} scales differently") })
            .collect()
    }

    /// A config.json that says all that this model's struct reads.
    fn config(&self, config: &ModelConfig) -> Value {
        let windows = windows(config);
        let kind = |window: &Option<usize>| match window {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        let window = windows.iter().flatten().next();
        let mut json = json!({
            "architectures": [self.architecture.name()],
            "model_type": self.architecture.model_type(),
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
        });
        json[self.architecture.family().activation.0] = config.hidden_act.name().into();
        match self.architecture {
            Architecture::Llama if config.architecture == Architecture::Granite => {
                json["embedding_multiplier"] = config.scales.embedding.into();
                json["attention_multiplier"] = config.scales.attention.into();
                json["residual_multiplier"] = config.scales.residual.into();
                json["logits_scaling"] = config.scales.logits.recip().into();
            }
            Architecture::SmolLm3 => {
                let turned: Vec<u8> = config.rotary_layers.iter().map(|&turned| turned.into()).collect();
                json["no_rope_layers"] = turned.into();
                json["no_rope_layer_interval"] = 4.into(); // the engine needs one, and does not look at it
            }
            Architecture::Gemma2 => {
                json["sliding_window"] = window.copied().unwrap_or(config.max_position_embeddings).into();
                json["query_pre_attn_scalar"] = query_scalar(config.scales).into();
                json["attn_logit_softcapping"] = config.scales.attention_cap.into();
                json["final_logit_softcapping"] = config.scales.logit_cap.into();
                json["rope_local_base_freq"] = config.local_rope_theta.into();
            }
            _ => {}
        }
        json
    }
}

/// `query_pre_attn_scalar`, if it is a whole number.
fn query_scalar(scales: Scales) -> Option<usize> {
    let scalar = scales.attention.powi(-2);
    ((scalar - scalar.round()).abs() < 1e-6 * scalar).then(|| scalar.round() as usize)
}

/// The windows of the layers, without those that are never full, unless layers with one are turned by other angles.
fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    if config.local_rope_theta.is_some() {
        return config.sliding_window.clone();
    }
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
            let theta = json!(engine.architecture.family().rope_theta);
            assert_eq!((&rewritten["rope_theta"], &rewritten["rms_norm_eps"]), (&theta, &json!(1e-6)));
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
            (
                Architecture::Granite,
                json!({"logits_scaling": 8, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                "rope_scaling",
                "yarn",
            ),
            (Architecture::SmolLm3, json!({"attention_bias": true}), "attention_bias", "true"),
            (
                Architecture::SmolLm3,
                json!({"use_sliding_window": true, "sliding_window": 64}),
                "sliding_window",
                "64",
            ),
            (Architecture::Gemma, json!({"tie_word_embeddings": false}), "tie_word_embeddings", "false"),
            (Architecture::Gemma2, json!({"query_pre_attn_scalar": 2.5}), "query_pre_attn_scalar", "2.5"),
        ] {
            let error = for_engine(&model(architecture, keys)).unwrap_err().to_string();
            assert!(error.contains(&format!("\"{key}\"")) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn what_smollm3_and_gemma_2_have_besides_is_said() {
        let rewritten = for_engine(&model(Architecture::SmolLm3, json!({"hidden_act": "gelu_new"}))).unwrap();
        assert_eq!(rewritten["no_rope_layers"], json!([1, 1, 1, 0]));
        assert_eq!(
            (&rewritten["hidden_act"], rewritten["no_rope_layer_interval"].is_u64()),
            (&json!("gelu_pytorch_tanh"), true)
        );
        let keys =
            json!({"query_pre_attn_scalar": 144, "attn_logit_softcapping": null, "sliding_window": 64});
        let rewritten = for_engine(&model(Architecture::Gemma2, keys)).unwrap();
        assert_eq!(
            (&rewritten["query_pre_attn_scalar"], &rewritten["sliding_window"]),
            (&json!(144), &json!(64))
        );
        let caps = [&rewritten["attn_logit_softcapping"], &rewritten["final_logit_softcapping"]];
        assert_eq!(caps, [&Value::Null, &json!(30.0)]);
        // the engine wants a window, and one that is never full changes nothing
        let rewritten = for_engine(&model(Architecture::Gemma2, json!({}))).unwrap();
        assert_eq!(rewritten["sliding_window"], 512);
        assert_eq!(rewritten["hidden_activation"], "gelu_pytorch_tanh");
        assert!(rewritten.get("hidden_act").is_none());
    }

    #[test]
    fn granite_is_a_llama_with_factors_and_gemma_3_a_gemma_2_with_more_keys() {
        let rewritten = for_engine(&model(Architecture::Granite, json!({"logits_scaling": 8}))).unwrap();
        assert_eq!(rewritten["architectures"], json!(["LlamaForCausalLM"]));
        let factors =
            ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"];
        assert_eq!(factors.map(|key| rewritten[key].as_f64()), [1.0, 1.0, 1.0, 8.0].map(Some));
        let llama = for_engine(&model(Architecture::Llama, json!({"logits_scaling": 8}))).unwrap();
        assert!(factors.iter().all(|key| llama.get(key).is_none()), "keys that a Llama does not read");

        let keys = json!({"sliding_window_pattern": 2, "rope_local_base_freq": 500.0});
        let rewritten = for_engine(&model(Architecture::Gemma3, keys)).unwrap();
        assert_eq!(rewritten["architectures"], json!(["Gemma2ForCausalLM"]));
        let thetas = [&rewritten["rope_theta"], &rewritten["rope_local_base_freq"]];
        assert_eq!(thetas, [&json!(1e6), &json!(500.0)]);
        // no window is ever full here, but the angles are those of layers with one
        let [sliding, full] = ["sliding_attention", "full_attention"];
        assert_eq!(rewritten["layer_types"], json!([sliding, full, sliding, full]));
        let turned = json!({"no_rope_layers": [1, 1, 1, 1], "attention_bias": true});
        let rewritten = for_engine(&model(Architecture::SmolLm3, turned)).unwrap();
        assert_eq!(rewritten["architectures"], json!(["LlamaForCausalLM"]));
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

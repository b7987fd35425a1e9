//! config.json of a checkpoint, rewritten for mistral.rs's own loaders.

use anyhow::{Context, Result, bail};
use dynamoe::{DynaMoeConfig, config::ARCHITECTURE, tensors};
use dynamoe_model::config::{self, Architecture, engine};
use mistralrs_core::{
    GemmaLoader, LlamaLoader, MistralLoader, Qwen2Loader,
    plugin::{Gemma2Loader, NormalModelLoader, Qwen3Loader, SmolLm3Loader},
};
use serde_json::Value;

use crate::moe::{self, MoeExperts, MoeLoader};

/// The engine's model that computes a checkpoint's.
enum Engine {
    Dense(Architecture),
    Moe(MoeLoader),
}

/// The dense or MoE model of a checkpoint, as mistral.rs understands its config.json.
pub(crate) struct BaseConfig {
    json: Value,
    engine: Engine,
    /// The `dynamoe` section; none in a dense checkpoint.
    pub dynamoe: Option<DynaMoeConfig>,
    /// The experts of an MoE model, whose config.json the engine gets as it is.
    pub moe: Option<MoeExperts>,
    /// `hidden_size`.
    pub hidden_size: usize,
}

impl BaseConfig {
    /// Parses the text of a config.json.
    pub fn parse(text: &str) -> Result<Self> {
        let json = config::parse(text).context("config.json is not JSON")?;
        let moe = MoeExperts::read(&json)?;
        let (json, dynamoe) = match json.pointer("/architectures/0").and_then(Value::as_str) {
            Some(ARCHITECTURE) => (dense_part(&json)?, Some(DynaMoeConfig::from_config_json(&json)?)),
            Some(name) if moe::loader(name).is_some() => (moe::for_engine(json), None),
            _ => (engine::dense_for_engine(&json)?, None),
        };
        let engine = json.pointer("/architectures/0").and_then(Value::as_str).unwrap_or_default();
        let engine = match moe::loader(engine) {
            Some(loader) => Engine::Moe(loader),
            None => Engine::Dense(Architecture::from_name(engine)?),
        };
        let hidden_size =
            json.get("hidden_size").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let hidden_size = hidden_size.context("config.json needs \"hidden_size\", a whole number")?;
        Ok(Self { json, engine, dynamoe, moe, hidden_size })
    }

    /// The text of the dense model's config.json.
    pub fn text(&self) -> String {
        self.json.to_string()
    }

    /// The text of the dense model's config.json with FFNs of `width` neurons.
    pub fn text_with_width(&self, width: usize) -> String {
        let mut json = self.json.clone();
        json["intermediate_size"] = width.into();
        json.to_string()
    }

    /// Whether the output matrix is the embedding.
    pub fn is_tied(&self) -> bool {
        self.json.get("tie_word_embeddings") == Some(&Value::Bool(true))
    }

    /// Whether the weights are quantized already.
    pub fn is_quantized(&self) -> bool {
        is_quantized(&self.json)
    }

    /// Whether the engine's model hands out its MLPs.
    pub fn has_mlps(&self) -> bool {
        matches!(self.engine, Engine::Dense(_))
    }

    /// mistral.rs's own loader of the dense model.
    pub fn loader(&self) -> Box<dyn NormalModelLoader> {
        let architecture = match self.engine {
            Engine::Dense(architecture) => architecture,
            Engine::Moe(loader) => return loader(),
        };
        match architecture {
            // the engine's Llama is a Granite, too, and its Gemma 2 a Gemma 3
            Architecture::Llama | Architecture::Granite => Box::new(LlamaLoader),
            Architecture::Mistral => Box::new(MistralLoader),
            Architecture::Qwen2 => Box::new(Qwen2Loader),
            Architecture::Qwen3 => Box::new(Qwen3Loader),
            Architecture::SmolLm3 => Box::new(SmolLm3Loader),
            Architecture::Gemma => Box::new(GemmaLoader),
            Architecture::Gemma2 | Architecture::Gemma3 => Box::new(Gemma2Loader),
        }
    }

    /// Numbers in each layer's router and compensation.
    pub fn router_elements(&self) -> usize {
        let Some(dynamoe) = &self.dynamoe else { return 0 };
        let router = tensors::router(dynamoe, self.hidden_size).into_iter().flatten();
        let table = router.chain(tensors::compensation(dynamoe, self.hidden_size));
        table.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

fn is_quantized(json: &Value) -> bool {
    json.get("quantization_config").is_some_and(|section| !section.is_null())
}

/// The dense model's config.json, from a DynaMoE checkpoint's.
fn dense_part(json: &Value) -> Result<Value> {
    if is_quantized(json) {
        bail!(
            "config.json has a quantization_config: a checkpoint that is quantized already is not supported; \
             convert the unquantized one and quantize it in place (ISQ) or to UQFF"
        );
    }
    engine::for_engine(json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mistralrs_core::plugin::{ModelPlugin, inventory};
    use serde_json::json;

    fn config_json() -> Value {
        json!({
            "architectures": ["DynaMoeForCausalLM"], "model_type": "dynamoe",
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "dynamoe": {
                "version": 1, "base_architecture": "LlamaForCausalLM", "base_model_type": "llama",
                "expert_widths": [32, 64], "router": {"kind": "mlp", "hidden_size": 4, "compensation": true},
                "sensitivity": 0.5
            }
        })
    }

    #[test]
    fn the_text_is_the_dense_models() {
        let config = BaseConfig::parse(&config_json().to_string()).unwrap();
        let base: Value = serde_json::from_str(&config.text()).unwrap();
        assert_eq!(base["architectures"], json!(["LlamaForCausalLM"]));
        assert_eq!((&base["model_type"], &base["intermediate_size"]), (&json!("llama"), &json!(64)));
        assert_eq!((&base["rope_theta"], base.get("dynamoe")), (&json!(500.0), None));
        let stub: Value = serde_json::from_str(&config.text_with_width(1)).unwrap();
        assert_eq!(stub["intermediate_size"], 1);
        // fc1 4·16 + 4, fc2 1·4 + 1, compensation 1·16
        assert_eq!(config.router_elements(), 68 + 5 + 16);
    }

    #[test]
    fn every_architecture_is_registered() {
        let registered: Vec<_> = inventory::iter::<ModelPlugin>
            .into_iter()
            .filter(|plugin| {
                plugin.architecture != ARCHITECTURE && moe::loader(plugin.architecture).is_none()
            })
            .map(|plugin| (plugin.name, plugin.architecture))
            .collect();
        let all: Vec<_> = Architecture::all()
            .map(|architecture| (architecture.model_type(), architecture.name()))
            .collect();
        assert!(all.iter().all(|names| registered.contains(names)), "{registered:?}");
        assert_eq!(registered.len(), all.len());
    }

    #[test]
    fn a_dense_models_text_is_rewritten_too() {
        let mut dense = config_json();
        dense["architectures"] = json!(["LlamaForCausalLM"]);
        dense["model_type"] = "llama".into();
        let text = dense.to_string().replace("500.0", "500.0, \"ignored\": NaN");
        let config = BaseConfig::parse(&text).unwrap();
        assert!(config.dynamoe.is_none() && !config.is_quantized() && !config.is_tied());
        assert!(config.text().contains("\"rope_theta\":500.0"));
        assert_eq!(config.router_elements(), 0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let error = |change: fn(&mut Value)| {
            let mut json = config_json();
            change(&mut json);
            format!("{:#}", BaseConfig::parse(&json.to_string()).map(|_| ()).unwrap_err())
        };
        let unknown = error(|json| json["dynamoe"]["base_architecture"] = "PhiForCausalLM".into());
        assert!(unknown.contains("PhiForCausalLM") && unknown.contains("Qwen3ForCausalLM"), "{unknown}");
        let quantized = error(|json| json["quantization_config"] = json!({"quant_method": "gptq"}));
        assert!(quantized.contains("quantization_config"), "{quantized}");
        let head = error(|json| {
            json["attention_bias"] = true.into();
            json["head_dim"] = 16.into();
        });
        assert!(head.contains("\"head_dim\" 16"), "{head}");
        assert!(error(|json| json["hidden_size"] = "wide".into()).contains("hidden_size"));
        assert!(error(|json| json["dynamoe"] = Value::Null).contains("dynamoe"));
    }
}

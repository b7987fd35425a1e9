//! config.json of a DynaMoE checkpoint, and of the dense model in it.

use anyhow::{Context, Result, bail, ensure};
use dynamoe::DynaMoeConfig;
use serde_json::Value;

/// Dense models whose FFN is SwiGLU-shaped in three separate matrices and can be swapped in mistral.rs.
pub(crate) const BASES: [&str; 7] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "SmolLM3ForCausalLM",
];

/// The config.json of a DynaMoE checkpoint, from which that of its dense model is made.
pub(crate) struct BaseConfig {
    json: Value,
    /// Its `dynamoe` section.
    pub dynamoe: DynaMoeConfig,
    /// `hidden_size`.
    pub hidden_size: usize,
}

impl BaseConfig {
    /// Parses the text of a config.json.
    pub fn parse(config: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(config).context("config.json is not JSON")?;
        let dynamoe = DynaMoeConfig::from_config_json(&json)?;
        ensure!(
            BASES.contains(&dynamoe.base_architecture.as_str()),
            "config.json: base_architecture must be one of {}, found {}",
            BASES.join(", "),
            dynamoe.base_architecture
        );
        if json.get("quantization_config").is_some_and(|section| !section.is_null()) {
            bail!(
                "config.json has a quantization_config: a checkpoint that is quantized already is not supported; \
                 convert the unquantized one and quantize it in place (ISQ) or to UQFF"
            );
        }
        let hidden_size =
            json.get("hidden_size").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let hidden_size = hidden_size.context("config.json needs \"hidden_size\", a whole number")?;
        Ok(Self { json, dynamoe, hidden_size })
    }

    /// The text of the dense model's config.json.
    pub fn text(&self) -> String {
        let mut json = self.json.clone();
        json["architectures"] = vec![self.dynamoe.base_architecture.as_str()].into();
        json["model_type"] = self.dynamoe.base_model_type.as_str().into();
        json.to_string()
    }

    /// The text of the dense model's config.json with FFNs of `width` neurons.
    pub fn text_with_width(&self, width: usize) -> Result<String> {
        let mut json: Value = serde_json::from_str(&self.text())?;
        json["intermediate_size"] = width.into();
        Ok(json.to_string())
    }

    /// Numbers in each layer's router and compensation.
    pub fn router_elements(&self) -> usize {
        let (d, r, narrower) =
            (self.hidden_size, self.dynamoe.router.hidden_size, self.dynamoe.experts() - 1);
        let compensation = if self.dynamoe.router.compensation { narrower * d } else { 0 };
        r * (d + 1) + if r > 0 { narrower * (r + 1) } else { 0 } + compensation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config_json() -> Value {
        json!({
            "architectures": ["DynaMoeForCausalLM"], "model_type": "dynamoe",
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
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
        let stub: Value = serde_json::from_str(&config.text_with_width(1).unwrap()).unwrap();
        assert_eq!(stub["intermediate_size"], 1);
        // fc1 4·16 + 4, fc2 1·4 + 1, compensation 1·16
        assert_eq!(config.router_elements(), 68 + 5 + 16);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let error = |change: fn(&mut Value)| {
            let mut json = config_json();
            change(&mut json);
            BaseConfig::parse(&json.to_string()).map(|_| ()).unwrap_err().to_string()
        };
        let unknown = error(|json| json["dynamoe"]["base_architecture"] = "PhiForCausalLM".into());
        assert!(unknown.contains("PhiForCausalLM") && unknown.contains("Qwen3ForCausalLM"), "{unknown}");
        let quantized = error(|json| json["quantization_config"] = json!({"quant_method": "gptq"}));
        assert!(quantized.contains("quantization_config"), "{quantized}");
        assert!(error(|json| json["hidden_size"] = "wide".into()).contains("hidden_size"));
        assert!(error(|json| json["dynamoe"] = Value::Null).contains("dynamoe"));
    }
}

//! The base architectures, and what sets each apart: the one list of them.
//!
//! Docs, errors, the engine's table and the plugin go by this list; see CONTRIBUTING.md, "Add an architecture".

use anyhow::{Context, Result, bail};
use dynamoe::HiddenAct;
use serde_json::Value;

use super::first_architecture;
use super::keys::Keys;

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
    /// `SmolLM3ForCausalLM`
    SmolLm3,
    /// `GemmaForCausalLM`
    Gemma,
    /// `Gemma2ForCausalLM`
    Gemma2,
    /// `Gemma3ForCausalLM`, which is Gemma 3's model of text.
    Gemma3,
    /// `GraniteForCausalLM`
    Granite,
}

/// What transformers' class for an architecture computes, and what absent keys mean to it.
pub(super) struct Family {
    pub architecture: Architecture,
    /// The name in config.json's `architectures`.
    pub name: &'static str,
    /// The name in config.json's `model_type`.
    pub model_type: &'static str,
    /// `max_position_embeddings` where it is absent; so are the next ones.
    pub positions: usize,
    pub rope_theta: f64,
    /// None for `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    pub tied: bool,
    /// The key that names the activation, and the activation where it is absent.
    pub activation: (&'static str, HiddenAct),
    /// Whether q, k and v have biases, whatever config.json says.
    pub qkv_bias: bool,
    /// Whether `attention_bias` is a key of the architecture's.
    pub attention_bias: bool,
    /// Whether `mlp_bias` is.
    pub mlp_bias: bool,
    /// Norms over the head dimension of q and k.
    pub qk_norm: bool,
    /// Norms scale by this plus their weight.
    pub norm_offset: f64,
    /// Norms of what attention and FFN put out.
    pub output_norms: bool,
}

/// Llama, which the others differ from.
const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    name: "LlamaForCausalLM",
    model_type: "llama",
    positions: 2048,
    rope_theta: 10_000.0,
    head_dim: None,
    tied: false,
    activation: ("hidden_act", HiddenAct::Silu),
    qkv_bias: false,
    attention_bias: true,
    mlp_bias: true,
    qk_norm: false,
    norm_offset: 0.0,
    output_norms: false,
};

/// Gemma, which its successors differ from.
const GEMMA: Family = Family {
    architecture: Architecture::Gemma,
    name: "GemmaForCausalLM",
    model_type: "gemma",
    positions: 8192,
    head_dim: Some(256),
    tied: true,
    activation: ("hidden_act", HiddenAct::GeluTanh),
    mlp_bias: false,
    norm_offset: 1.0,
    ..LLAMA
};

const GEMMA2: Family = Family {
    architecture: Architecture::Gemma2,
    name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    activation: ("hidden_activation", HiddenAct::GeluTanh),
    output_norms: true,
    ..GEMMA
};

/// The list.
const FAMILIES: [Family; 9] = [
    LLAMA,
    Family {
        architecture: Architecture::Mistral,
        name: "MistralForCausalLM",
        model_type: "mistral",
        positions: 131_072,
        attention_bias: false,
        mlp_bias: false,
        ..LLAMA
    },
    Family {
        architecture: Architecture::Qwen2,
        name: "Qwen2ForCausalLM",
        model_type: "qwen2",
        positions: 32_768,
        qkv_bias: true,
        attention_bias: false,
        mlp_bias: false,
        ..LLAMA
    },
    Family {
        architecture: Architecture::Qwen3,
        name: "Qwen3ForCausalLM",
        model_type: "qwen3",
        positions: 32_768,
        head_dim: Some(128),
        mlp_bias: false,
        qk_norm: true,
        ..LLAMA
    },
    Family {
        architecture: Architecture::SmolLm3,
        name: "SmolLM3ForCausalLM",
        model_type: "smollm3",
        positions: 32_768,
        rope_theta: 2_000_000.0,
        tied: true,
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    Family {
        architecture: Architecture::Gemma3,
        name: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        positions: 131_072,
        rope_theta: 1_000_000.0,
        qk_norm: true,
        ..GEMMA2
    },
    Family {
        architecture: Architecture::Granite,
        name: "GraniteForCausalLM",
        model_type: "granite",
        ..LLAMA
    },
];

impl Architecture {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        FAMILIES.iter().map(|family| family.architecture)
    }

    pub(super) fn family(self) -> &'static Family {
        FAMILIES.iter().find(|family| family.architecture == self).expect("the list has every architecture")
    }

    /// The name in config.json's `architectures`.
    pub fn name(self) -> &'static str {
        self.family().name
    }

    /// The name in config.json's `model_type`.
    pub fn model_type(self) -> &'static str {
        self.family().model_type
    }

    /// Whether the FFN's matrices may have biases (`mlp_bias`).
    pub fn has_ffn_biases(self) -> bool {
        self.family().mlp_bias
    }

    /// The architecture of this name in `architectures`.
    ///
    /// # Errors
    /// A name that is not in the list; the message shows the list.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::all().find(|architecture| architecture.name() == name).with_context(|| {
            let known: Vec<&str> = Self::all().map(Self::name).collect();
            format!(
                "architecture {name:?} is not supported; supported: {}, {}",
                known.join(", "),
                dynamoe::config::ARCHITECTURE
            )
        })
    }

    fn from_model_type(name: &str) -> Option<Self> {
        Self::all().find(|architecture| architecture.model_type() == name)
    }

    /// The architecture of a dense model, from `architectures`, or from `model_type` where that is absent.
    pub(super) fn of_dense(keys: &Keys) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_page_shows_the_list() {
        let mut table = String::from(
            "| `base_architecture` | `base_model_type` | activation, and its key in the base |\n| --- | --- | --- |\n",
        );
        for Family { name, model_type, activation: (key, act), .. } in &FAMILIES {
            table += &format!("| `{name}` | `{model_type}` | {}, `{key}` |\n", act.name());
        }
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoint-format.md");
        let page = std::fs::read_to_string(page).unwrap();
        assert!(page.contains(&table), "docs/checkpoint-format.md should hold this table:\n{table}");
    }

    #[test]
    fn names_lead_to_architectures() {
        for architecture in Architecture::all() {
            assert_eq!(Architecture::from_name(architecture.name()).unwrap(), architecture);
            assert_eq!(Architecture::from_model_type(architecture.model_type()), Some(architecture));
        }
    }
}

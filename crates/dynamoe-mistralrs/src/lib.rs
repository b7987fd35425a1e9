//! DynaMoE models (arXiv 2502.12325) in mistral.rs.
//!
//! Linking this crate is enough: mistral.rs then loads a checkpoint whose config.json says
//! `"architectures": ["DynaMoeForCausalLM"]`, and knows `--arch dynamoe` and, in a TOML file, `arch = "dynamoe"`. Dense
//! models of the same architectures are then loaded through this crate too: it rewrites their config.json to what the
//! engine understands, and refuses what the engine would ignore. MoE models are loaded through it as well, and get the
//! same dial for the number of experts that a token runs ([`moe`]).
//!
//! ```
//! use dynamoe_mistralrs as _; // linked only if something refers to it
//!
//! assert!("dynamoe".parse::<mistralrs_core::NormalLoaderType>().is_ok());
//! ```
//!
//! [`loaded`] hands out the models that are in memory; a [`LoadedModel`] holds the default dial, makes the dial of
//! one request, and counts. docs/engine.md tells what the patched engine adds, docs/serving.md how to serve.

mod base_config;
mod checked;
mod counters;
#[cfg(feature = "cuda")]
mod cuda;
mod default_dial;
mod dense;
mod dial;
mod engine_blocks;
mod experts;
mod ffn;
mod kind;
mod loaded;
mod loader;
mod locks;
mod model;
pub mod moe;
#[cfg(any(test, feature = "cuda"))]
mod pending;
mod projection;
#[cfg(feature = "serve")]
pub mod serve;
mod weights;

pub use counters::{Counters, LayerCounts};
pub use dial::{Phase, PhaseDials, RequestDial};
pub use dynamoe::Dial;
pub use ffn::{NamedTensors, SwappedFfns, swap_ffns};
pub use kind::ModelKind;
pub use loaded::{LoadedModel, loaded};
pub use loader::DynaMoeLoader;
pub use weights::LayerWeights;

use mistralrs_core::plugin::{ModelPlugin, inventory};

/// A registered loader comes before the engine's own.
macro_rules! register {
    ($($name:expr => $architecture:expr),* $(,)?) => {
        $(inventory::submit! {
            ModelPlugin { name: $name, architecture: $architecture, loader: || Box::new(DynaMoeLoader) }
        })*
    };
}

register! {
    dynamoe::config::MODEL_TYPE => dynamoe::config::ARCHITECTURE,
    "llama" => "LlamaForCausalLM",
    "mistral" => "MistralForCausalLM",
    "qwen2" => "Qwen2ForCausalLM",
    "qwen3" => "Qwen3ForCausalLM",
    "smollm3" => "SmolLM3ForCausalLM",
    "gemma" => "GemmaForCausalLM",
    "gemma2" => "Gemma2ForCausalLM",
    "gemma3_text" => "Gemma3ForCausalLM",
    "granite" => "GraniteForCausalLM",
    "qwen3moe" => "Qwen3MoeForCausalLM",
    "qwen3next" => "Qwen3NextForCausalLM",
    "deepseekv2" => "DeepseekV2ForCausalLM",
    "deepseekv3" => "DeepseekV3ForCausalLM",
    "glm4moe" => "Glm4MoeForCausalLM",
    "glm4moelite" => "Glm4MoeLiteForCausalLM",
    "mixtral" => "MixtralForCausalLM",
}

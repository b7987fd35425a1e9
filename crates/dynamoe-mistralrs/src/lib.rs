//! DynaMoE models (arXiv 2502.12325) in mistral.rs.
//!
//! Linking this crate is enough: mistral.rs then loads a checkpoint whose config.json says
//! `"architectures": ["DynaMoeForCausalLM"]`, and knows `--arch dynamoe` and, in a TOML file, `arch = "dynamoe"`.
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
mod counters;
#[cfg(feature = "cuda")]
mod cuda;
mod dial;
mod engine_blocks;
mod experts;
mod ffn;
mod loaded;
mod loader;
mod model;
#[cfg(any(test, feature = "cuda"))]
mod pending;
mod projection;
#[cfg(feature = "serve")]
pub mod serve;
mod stub;
mod weights;

pub use counters::{Counters, LayerCounts};
pub use dial::{Dial, Phase, PhaseDials, RequestDial};
pub use ffn::{NamedTensors, SwappedFfns, swap_ffns};
pub use loaded::{LoadedModel, loaded};
pub use loader::DynaMoeLoader;
pub use weights::LayerWeights;

use mistralrs_core::plugin::{ModelPlugin, inventory};

inventory::submit! {
    ModelPlugin {
        name: dynamoe::config::MODEL_TYPE,
        architecture: dynamoe::config::ARCHITECTURE,
        loader: || Box::new(DynaMoeLoader),
    }
}

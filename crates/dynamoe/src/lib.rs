//! The DynaMoE FFN (arXiv 2502.12325): nested experts cut out of a dense gated FFN, a router that predicts
//! each token's difficulty, and a dial.
//!
//! | idea | here |
//! | --- | --- |
//! | the layer, a candle `Module` | [`DynaMoeFfn`] ([`DynaMoeFfn::load`] reads it from a checkpoint) |
//! | the section of config.json | [`DynaMoeConfig`] |
//! | what a user turns, and the table of budgets | [`Dial`], [`Budget`] |
//! | how difficult a token is | [`Router`] |
//! | which expert each token takes | [`Routes`] |
//! | nested experts | [`PrefixExperts`] (whole matrices), [`ShellExperts`] (any projections), [`PackedExperts`] (CPU kernels) |
//! | the activation of the gate | [`HiddenAct`] |
//! | names and shapes of a layer's tensors | [`tensors`] |
//! | CPU kernels | [`cpu`] |
//! | the layer while it is trained | `train`, with the feature `train` |
//! | the layer as it reads on paper | [`mod@reference`] |
//!
//! Functions that return `candle_core::Result` fail as candle does. `# Errors` lists what is beyond that.
//!
//! Letters in shape comments: `T` tokens, `D` hidden_size, `I` intermediate_size, `E` experts,
//! `R` the router's hidden size, `P` neurons for which the smaller experts have separate weights.

pub mod activation;
pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod dial;
pub mod error;
pub mod experts;
pub mod ffn;
pub mod math;
pub mod reference;
pub mod router;
pub mod routes;
pub mod sensitivity;
pub mod tensors;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod testing;
#[cfg(feature = "train")]
pub mod train;

#[cfg(feature = "cuda")]
pub use dynamoe_kernels::cuda::{Segment as CudaSegment, Segments as CudaSegments, Weight as CudaWeight};

pub use activation::HiddenAct;
pub use config::{DynaMoeConfig, RouterConfig, RouterKind};
pub use dial::Dial;
pub use error::{Error, Result};
pub use experts::{NestedExperts, PackedExperts, PrefixExperts, Projections, ShellExperts};
pub use ffn::DynaMoeFfn;
pub use router::Router;
pub use routes::{PendingRoutes, Routes};
pub use sensitivity::{Budget, Sensitivity};
#[cfg(feature = "train")]
pub use train::TrainableFfn;

//! The DynaMoE FFN (arXiv 2502.12325): nested experts cut out of a dense SwiGLU FFN, a router that predicts
//! each token's difficulty, and a dial.
//!
//! Letters in shape comments: `T` tokens, `D` hidden_size, `I` intermediate_size, `E` experts,
//! `R` the router's hidden size.

pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod error;
pub mod experts;
pub mod ffn;
pub mod math;
pub mod names;
pub mod reference;
pub mod router;
pub mod routes;
pub mod swiglu;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod testing;
pub mod train;

#[cfg(feature = "cuda")]
pub use dynamoe_kernels::cuda::{Segment as CudaSegment, Weight as CudaWeight};

pub use config::{Budget, DynaMoeConfig, RouterConfig, RouterKind, Sensitivity};
pub use error::{Error, Result};
pub use experts::{NestedExperts, PackedExperts, PrefixExperts, Shell, ShellExperts};
pub use ffn::DynaMoeFfn;
pub use router::Router;
pub use routes::{PendingRoutes, Routes};
pub use train::TrainableFfn;

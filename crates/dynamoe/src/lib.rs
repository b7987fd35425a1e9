//! The DynaMoE FFN (arXiv 2502.12325): nested experts cut out of a dense SwiGLU FFN, a router that predicts
//! each token's difficulty, and a dial.
//!
//! Letters in shape comments: `T` tokens, `D` hidden_size, `I` intermediate_size, `E` experts,
//! `R` the router's hidden size.

pub mod config;
pub mod error;
pub mod names;

pub use config::{Budget, DynaMoeConfig, RouterConfig, RouterKind, Sensitivity};
pub use error::{Error, Result};

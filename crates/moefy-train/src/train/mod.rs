//! Fine-tuning: the weights and the routers of a DynaMoE model, under a routing objective.
//!
//! [`Trainer`] runs the loop; [`objective`] holds the ways to route during training; everything random in a
//! step is a function of (seed, step), so a resumed run needs no generator's state.

pub mod config;
pub mod dial;
pub mod objective;
pub mod optimizer;
pub mod progress;
pub mod state;
pub mod step;
mod trainer;

pub use config::{Method, Mode, TrainConfig};
pub use step::TrainModel;
pub use trainer::{Outcome, Trainer, is_running};

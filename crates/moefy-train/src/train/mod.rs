//! Fine-tuning: the weights and the routers of a DynaMoE model, under a method's objective.
//!
//! [`Trainer`] runs the loop over [`TrainModel::loss`]; [`optimizer`] changes the weights; [`state`] keeps checkpoints of
//! the training. Everything random in a step is a function of (seed, step), so a resumed run needs no generator's state.

mod config;
mod group;
mod metrics_log;
mod model;
pub mod optimizer;
pub mod state;
mod step;
mod stop;
mod teacher;
mod trainer;
mod tuning;

pub use config::{TrainConfig, Trained};
pub use group::Group;
pub use model::TrainModel;
pub use step::{StepBatch, StepContext, StepLoss};
pub use stop::Stop;
pub use trainer::{Outcome, Trainer};
pub use tuning::Tuning;

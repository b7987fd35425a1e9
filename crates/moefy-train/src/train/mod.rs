//! Fine-tuning: the weights and the routers of a DynaMoE model, under a method's objective.
//!
//! [`Trainer`] runs the loop over [`TrainModel::accumulate`]; [`optimizer`] changes the weights; [`state`] keeps checkpoints of
//! the training. Everything random in a step is a function of (seed, step), so a resumed run needs no generator's state.

mod blockwise;
mod config;
mod events;
mod group;
mod head;
pub mod memory;
mod metrics_log;
mod model;
mod moments;
pub mod optimizer;
mod shards;
mod share;
pub mod state;
mod step;
mod stop;
mod sum;
mod targets;
mod teacher;
mod trainer;
mod tuning;
mod watch;

pub use config::{MomentBits, TrainConfig, Trained};
pub use group::Group;
pub use memory::Memory;
pub use model::TrainModel;
pub use step::{StepBatch, StepContext, StepLoss};
pub use stop::Stop;
pub use teacher::Teacher;
pub use trainer::{Outcome, Trainer};
pub use tuning::Tuning;

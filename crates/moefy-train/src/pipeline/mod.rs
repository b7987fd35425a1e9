//! The stages of making a checkpoint, and the commands that string them together.
//!
//! A [`Recipe`] is how a model is cut and trained. Its stages are convert, train, publish and measure. They work in a
//! [`Lab`]: the model that they start from, the text and the device. Text that the model has to write itself comes before
//! them all ([`write_own_text`]). [`run`] is one recipe with its baselines,
//! [`compare`] trains many recipes alike, [`pretrain`] makes a dense model to start from.

pub mod compare;
mod folder;
mod lab;
mod lock;
mod own_text;
pub mod pretrain;
mod recipe;
pub mod run;
mod table;

pub use folder::{Existing, RunFolder, TRAINING};
pub use lab::{HeldOut, Inputs, Lab, describe_sources};
pub use own_text::{OWN_TEXT, write_own_text};
pub use recipe::{Publication, Recipe, Start, TrainJob, Training, write_model};
pub use table::{Cell, Row, Table};

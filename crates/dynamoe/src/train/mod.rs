//! The layer while it is trained: one full-width pass that has every expert's gradient.

mod ffn;
pub mod glu;

pub use ffn::TrainableFfn;

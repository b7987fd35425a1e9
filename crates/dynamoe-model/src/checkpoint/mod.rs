//! Checkpoint folders: config.json, safetensors, tokenizer.
//!
//! [`Checkpoint`] reads one, [`Writer`] writes the tensors of one, [`StagedFolder`] makes a new folder appear
//! whole or not at all. [`AddOn`] is what a model has beyond its base, in a folder of its own.
//! docs/checkpoint-format.md specifies what is in it.

mod add_on;
pub mod copy;
mod layout;
mod order;
mod reader;
mod staged;
mod writer;

pub use add_on::{ADD_ON_VERSION, AddOn, Base, write_add_on};
pub use copy::{remove_section, save_model, set_section};
pub use layout::{ADD_ON_CONFIG, ADD_ON_TENSORS, CHUNK_BYTES, TensorInfo};
pub use reader::{Checkpoint, float_dtype};
pub use staged::{StagedFolder, refuse_overlap, write_atomic};
pub use writer::{
    DEFAULT_SHARD_BYTES, TensorSpec, Writer, check_finite, plan_shards, save_tensors, to_bytes,
};

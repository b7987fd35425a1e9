//! Checkpoint folders: config.json, safetensors, tokenizer.
//!
//! [`Checkpoint`] reads one, [`Writer`] writes the tensors of one, [`StagedFolder`] makes a new folder appear
//! whole or not at all. docs/checkpoint-format.md specifies what is in it.

pub mod copy;
mod reader;
mod staged;
mod writer;

pub use copy::{remove_section, save_model, set_section, store_section};
pub use reader::{Checkpoint, TensorInfo, float_dtype};
pub use staged::{StagedFolder, refuse_overlap, write_atomic};
pub use writer::{
    DEFAULT_SHARD_BYTES, TensorSpec, Writer, check_finite, plan_shards, save_tensors, to_bytes,
};

//! What a checkpoint consists of: the names of its files, and where a tensor lies in them.

use safetensors::Dtype;

/// All tensors of a checkpoint that is not divided into shards.
pub(super) const SINGLE: &str = "model.safetensors";
/// The list of shards of one that is.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The description of an add-on.
pub const ADD_ON_CONFIG: &str = "add_on.json";
/// The tensors of an add-on.
pub const ADD_ON_TENSORS: &str = "add_on.safetensors";

/// Bytes of a tensor in memory at a time while it is copied.
pub const CHUNK_BYTES: usize = 8 << 20;

/// Where a tensor is and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Index of its file in [`super::Checkpoint::shards`].
    pub shard: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub len: usize,
}

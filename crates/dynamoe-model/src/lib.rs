//! A language model with DynaMoE FFNs: a Llama or one of its relatives whose every FFN is nested experts and a router.
//!
//! | concept | module |
//! | --- | --- |
//! | Hugging Face's config.json, and which architectures are read | [`config`] |
//! | finding a model: a folder, a hub id or a GGUF file; files of the hub's data sets | [`hub`] |
//! | GGUF files as folders | [`gguf`] |
//! | a conversation as text | [`chat`] |
//! | every tensor of a model with its shape | [`tensors`] |
//! | checkpoint folders: reading, writing, copying | [`checkpoint`] |
//! | trainable tensors by name | [`params`] |
//! | the model: forward and backward | [`model`], on the fused operations of [`ops`] |
//! | rewriting a checkpoint, dense or in another type | [`export`] |
//! | an ordinary model of any width | [`mod@slice`] |
//! | telling what a checkpoint is | [`inspect`] |
//! | what a program says of itself | [`mod@version`] |
//! | Python code that checkpoints carry for transformers | [`transformers`] |
//!
//! Letters in shape comments: `B` sequences, `T` positions, `N = B·T` tokens, `D` hidden_size,
//! `I` intermediate_size, `E` experts, `L` layers, `V` vocabulary, `H` attention heads, `K` key/value heads,
//! `d` head_dim.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod export;
pub mod files;
pub mod gguf;
pub mod hub;
pub mod inspect;
pub mod model;
pub mod ops;
pub mod params;
pub mod slice;
pub mod tensors;
pub mod transformers;
pub mod version;

pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use model::RoutedModel;
pub use params::Params;

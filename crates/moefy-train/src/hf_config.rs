//! Hugging Face's config.json of a decoder-only language model, dense or DynaMoE.

use std::path::Path;

use anyhow::{Result, bail};
use dynamoe::config::DynaMoeConfig;

/// A supported base architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`
    Llama,
    /// `MistralForCausalLM`
    Mistral,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `Qwen3ForCausalLM`
    Qwen3,
}

/// Llama 3's stretching of the rotary frequencies (`rope_type: "llama3"`).
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Rope {
    /// `factor`
    pub factor: f64,
    /// `low_freq_factor`
    pub low_freq_factor: f64,
    /// `high_freq_factor`
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`
    pub original_max_position_embeddings: usize,
}

/// Rescaling of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by a factor (`rope_type: "linear"`).
    Linear(f64),
    /// Llama 3's.
    Llama3(Llama3Rope),
}

/// What the model code needs to know, whatever the architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The base architecture.
    pub architecture: Architecture,
    /// `hidden_size`, D.
    pub hidden_size: usize,
    /// `intermediate_size`, I.
    pub intermediate_size: usize,
    /// `num_hidden_layers`, L.
    pub num_hidden_layers: usize,
    /// `num_attention_heads`, H.
    pub num_attention_heads: usize,
    /// `num_key_value_heads`, K.
    pub num_key_value_heads: usize,
    /// `head_dim`, d.
    pub head_dim: usize,
    /// `vocab_size`, V.
    pub vocab_size: usize,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `rope_scaling`, none for plain rotary embeddings.
    pub rope_scaling: Option<RopeScaling>,
    /// `tie_word_embeddings`: the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v projections carry biases.
    pub qkv_bias: bool,
    /// The attention's output projection carries a bias.
    pub o_bias: bool,
    /// RMS norms over the head dimension of q and k (Qwen3).
    pub qk_norm: bool,
    /// For each layer: the attention window, none for full attention.
    pub sliding_window: Vec<Option<usize>>,
    /// `bos_token_id`, where the config has one.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`: none, one or several.
    pub eos_token_ids: Vec<u32>,
    /// Our section, for a DynaMoE checkpoint.
    pub dynamoe: Option<DynaMoeConfig>,
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// A missing or broken file, an unsupported architecture (the message lists those supported), an option
    /// that changes the computation and is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        bail!("{}: not written yet", dir.display())
    }
}

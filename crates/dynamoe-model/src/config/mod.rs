//! Hugging Face's config.json of a decoder-only language model, dense or DynaMoE: the one reader of it, for the trainer
//! and for the engine's plugin.
//!
//! What a key means, and what its absence means, follows transformers. [`engine`] writes the same configuration again
//! for mistral.rs.

mod architecture;
mod attention;
pub mod engine;
mod json;
mod keys;
mod rope;
mod scales;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use dynamoe::HiddenAct;
use dynamoe::config::DynaMoeConfig;
use serde_json::Value;

use crate::files::read_text;

pub use architecture::Architecture;
use attention::{head_dim, heads, rotary_layers, sliding_window};
pub use json::{parse, remove_not_finite};
use keys::Keys;
pub use rope::{Llama3Rope, RopeScaling, YarnRope};
pub use scales::Scales;

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
    /// `rope_theta` of the layers with a window, if they have one of their own; they are not rescaled (Gemma 3).
    pub local_rope_theta: Option<f64>,
    /// `tie_word_embeddings`: the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v projections carry biases.
    pub qkv_bias: bool,
    /// The attention's output projection carries a bias.
    pub o_bias: bool,
    /// The FFN's matrices carry biases: dense models only. Only the bias of `down_proj` is computed; the others have to be
    /// zero, as in a slice of a DynaMoE model.
    pub mlp_bias: bool,
    /// RMS norms over the head dimension of q and k (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// Norms scale by this plus their weight: 1 for Gemma, else 0.
    pub norm_offset: f64,
    /// What attention and FFN put out passes a norm before it is added to the residual stream (Gemma 2
    /// and 3).
    pub output_norms: bool,
    /// The activation of the FFN's gate.
    pub hidden_act: HiddenAct,
    /// Factors and caps.
    pub scales: Scales,
    /// For each layer: whether q and k are turned.
    pub rotary_layers: Vec<bool>,
    /// For each layer: the attention window, none for full attention.
    pub sliding_window: Vec<Option<usize>>,
    /// `bos_token_id`, where the config has one.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`: none, one or several.
    pub eos_token_ids: Vec<u32>,
    /// `closing_token_id`: the token that ends a document, where training found out which one the model ends documents
    /// with. No other program reads this key.
    pub closing_token_id: Option<u32>,
    /// Our section, for a DynaMoE checkpoint.
    pub dynamoe: Option<DynaMoeConfig>,
}

/// Bounds that no model comes near; they keep a hostile config.json from asking for absurd allocations.
const MAX_DIMENSION: u64 = 1 << 28;
const MAX_LAYERS: usize = 10_000;

/// `architectures[0]`, where there is one.
fn first_architecture(json: &Value) -> Option<&str> {
    json.pointer("/architectures/0").and_then(Value::as_str)
}

/// `dir/config.json`, keys in the file's order. A number that is not finite, as Python writes it, becomes the string of
/// its name; see [`remove_not_finite`].
///
/// # Errors
/// A missing file, one that is not a JSON object, or a PEFT adapter's folder.
pub fn read_json(dir: &Path) -> Result<Value> {
    let adapter = dir.join("adapter_config.json");
    if adapter.exists() {
        bail!(
            "{}: the folder holds a PEFT adapter, not a whole model: merge the adapter into its base model (PEFT's \
             merge_and_unload) and give the folder of the result; if the weights here are merged already, remove this \
             file",
            adapter.display()
        );
    }
    let path = dir.join("config.json");
    let text = read_text(&path).with_context(|| {
        format!(
            "{}: cannot be read; a model is a folder with config.json and *.safetensors, or a .gguf file",
            path.display()
        )
    })?;
    let value = parse(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
    ensure!(value.is_object(), "{}: expected a JSON object", path.display());
    Ok(value)
}

impl ModelConfig {
    /// Refuses biases of the FFN where something does not compute them.
    ///
    /// # Errors
    /// A model that has them.
    pub fn refuse_biases(&self, what: &str) -> Result<()> {
        ensure!(
            !self.mlp_bias,
            "config.json: \"mlp_bias\" true: {what} does not know biases of the FFN: use a model without, such as the one \
             that a slice was cut from"
        );
        Ok(())
    }

    /// `H_e` of every layer; a dense model has one expert.
    pub fn expert_widths(&self) -> Vec<usize> {
        self.dynamoe.as_ref().map_or_else(|| vec![self.intermediate_size], |d| d.expert_widths.clone())
    }

    /// `H_e / I` of each expert, ascending to 1.
    pub fn width_shares(&self) -> Vec<f64> {
        let full = self.intermediate_size as f64;
        self.expert_widths().into_iter().map(|width| width as f64 / full).collect()
    }

    /// Reads `dir/config.json`. `dir/generation_config.json` adds to its `eos_token_id`, and names `bos_token_id` if it does
    /// not.
    ///
    /// # Errors
    /// A missing or broken file, an unsupported architecture (the message lists those supported), an option
    /// that changes the computation and is not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut config = Self::from_json(&read_json(dir)?)
            .with_context(|| dir.join("config.json").display().to_string())?;
        let path = dir.join("generation_config.json");
        let text = read_text(&path).unwrap_or_default();
        if let Ok(generation) = parse(&text) {
            let keys = Keys(&generation);
            let ids = |key| keys.token_ids(key).with_context(|| path.display().to_string());
            if config.bos_token_id.is_none() {
                config.bos_token_id = ids("bos_token_id")?.first().copied();
            }
            for id in ids("eos_token_id")? {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Reads a parsed config.json. Absent keys take the default of transformers' class for the architecture,
    /// but for token ids (absent means none) and `num_key_value_heads` (absent means `num_attention_heads`).
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_json(json: &Value) -> Result<Self> {
        let keys = Keys(json);
        let ours = first_architecture(json) == Some(dynamoe::config::ARCHITECTURE)
            || keys.get("model_type").and_then(Value::as_str) == Some(dynamoe::config::MODEL_TYPE);
        let dynamoe = ours.then(|| DynaMoeConfig::from_config_json(json)).transpose()?;
        let architecture = match &dynamoe {
            Some(section) => Architecture::from_name(&section.base_architecture)?,
            None => Architecture::of_dense(&keys)?,
        };
        let family = architecture.family();
        refuse_unsupported(&keys)?;
        let hidden_act = hidden_act(&keys, architecture)?;
        if let Some(section) = &dynamoe {
            ensure!(
                section.hidden_act == hidden_act,
                "\"dynamoe\": \"hidden_act\" is {:?}, but the base's is {:?}: expected the same",
                section.hidden_act.name(),
                hidden_act.name()
            );
        }
        // the other architectures' FFNs have no biases, whatever this key says
        let mlp_bias = family.mlp_bias && keys.flag("mlp_bias")?.unwrap_or(false);
        ensure!(!(mlp_bias && ours), "\"mlp_bias\": DynaMoE FFNs have no biases, found true");

        let hidden_size = keys.size("hidden_size")?;
        let num_hidden_layers = keys.size("num_hidden_layers")?;
        ensure!(
            num_hidden_layers <= MAX_LAYERS,
            "\"num_hidden_layers\": at most {MAX_LAYERS} expected, found {num_hidden_layers}"
        );
        let (num_attention_heads, num_key_value_heads) = heads(&keys)?;
        let max_position_embeddings =
            keys.optional_size("max_position_embeddings")?.unwrap_or(family.positions);
        let (rope_theta, rope_scaling, local) =
            rope::read_both(&keys, max_position_embeddings, family.rope_theta)?;
        let attention_bias = family.attention_bias && keys.flag("attention_bias")?.unwrap_or(false);
        let head_dim = head_dim(&keys, architecture, hidden_size, num_attention_heads)?;
        let rotary_layers = rotary_layers(&keys, architecture, num_hidden_layers)?;
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            local_rope_theta: (architecture == Architecture::Gemma3).then_some(local),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(family.tied),
            qkv_bias: attention_bias || family.qkv_bias,
            o_bias: attention_bias,
            mlp_bias,
            qk_norm: family.qk_norm,
            norm_offset: family.norm_offset,
            output_norms: family.output_norms,
            hidden_act,
            scales: Scales::read(&keys, architecture, hidden_size, head_dim)?,
            sliding_window: sliding_window(&keys, architecture, &rotary_layers)?,
            rotary_layers,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
            closing_token_id: keys.token_ids("closing_token_id")?.first().copied(),
            dynamoe,
        })
    }
}

/// Options that change the computation in ways that this crate does not know.
fn refuse_unsupported(keys: &Keys) -> Result<()> {
    if let Some(found) = keys.get("quantization_config") {
        let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        bail!(
            "the weights are quantized (quantization_config, method {method:?}): give the unquantized model (F32, F16 or BF16)"
        );
    }
    if keys.flag("use_bidirectional_attention")?.unwrap_or(false) {
        bail!("\"use_bidirectional_attention\": only false is supported, found true");
    }
    let rotary = keys.number("partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(rotary == 1.0, "\"partial_rotary_factor\": only 1 is supported, found {rotary}");
    Ok(())
}

/// The activation of the FFN's gate.
fn hidden_act(keys: &Keys, architecture: Architecture) -> Result<HiddenAct> {
    let (key, default) = architecture.family().activation;
    let Some(found) = keys.get(key) else { return Ok(default) };
    // Gemma's first configurations mean the tanh's formula by it, as transformers knows
    let legacy = architecture == Architecture::Gemma && found.as_str() == Some("gelu");
    if legacy {
        return Ok(HiddenAct::GeluTanh);
    }
    found.as_str().and_then(HiddenAct::from_name).with_context(|| {
        let known = HiddenAct::ALL.map(|act| format!("{:?}", act.name()));
        format!("\"{key}\": only {} are supported, found {found}", known.join(" and "))
    })
}

/// Whether the activation that config.json names is one of ours.
fn has_known_activation(json: &Value) -> bool {
    let keys = Keys(json);
    Architecture::of_dense(&keys).is_ok_and(|architecture| hidden_act(&keys, architecture).is_ok())
}

#[cfg(test)]
mod tests;

//! Factors of what a model computes, and caps: plain Llamas have none.

use anyhow::Result;

use super::Architecture;
use super::keys::Keys;

/// Factors and caps on the way through a model. A cap `c` turns `x` into `c tanh(x / c)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Of embeddings.
    pub embedding: f64,
    /// Of attention's scores, before their cap.
    pub attention: f64,
    /// Of what attention and FFN add to the residual stream.
    pub residual: f64,
    /// Of logits, before their cap.
    pub logits: f64,
    /// Of attention's scores.
    pub attention_cap: Option<f64>,
    /// Of logits.
    pub logit_cap: Option<f64>,
}

impl Scales {
    /// Those of a model with heads of `head_dim` numbers that has no keys of its own for them.
    pub fn plain(head_dim: usize) -> Self {
        Self {
            embedding: 1.0,
            attention: (head_dim as f64).powf(-0.5),
            residual: 1.0,
            logits: 1.0,
            attention_cap: None,
            logit_cap: None,
        }
    }

    /// What config.json asks for.
    pub(super) fn read(
        keys: &Keys,
        architecture: Architecture,
        hidden_size: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let plain = Self::plain(head_dim);
        let number = |key, default: f64| Ok::<_, anyhow::Error>(keys.number(key)?.unwrap_or(default));
        // a null turns a cap off
        let cap = |key, default: f64| {
            Ok::<_, anyhow::Error>(keys.number(key)?.or(keys.is_absent(key).then_some(default)))
        };
        let embedding = (hidden_size as f64).sqrt();
        Ok(match architecture {
            Architecture::Gemma => Self { embedding, ..plain },
            Architecture::Gemma2 => Self {
                embedding,
                attention: number("query_pre_attn_scalar", 256.0)?.powf(-0.5),
                attention_cap: cap("attn_logit_softcapping", 50.0)?,
                logit_cap: cap("final_logit_softcapping", 30.0)?,
                ..plain
            },
            Architecture::Gemma3 => Self {
                embedding,
                attention: number("query_pre_attn_scalar", 256.0)?.powf(-0.5),
                // transformers reads the key for the scores' cap, and does not use it
                logit_cap: keys.number("final_logit_softcapping")?,
                ..plain
            },
            Architecture::Granite => Self {
                embedding: number("embedding_multiplier", 1.0)?,
                attention: number("attention_multiplier", 1.0)?,
                residual: number("residual_multiplier", 1.0)?,
                logits: number("logits_scaling", 1.0)?.recip(),
                ..plain
            },
            _ => plain,
        })
    }
}

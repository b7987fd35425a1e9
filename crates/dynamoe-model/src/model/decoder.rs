//! A model token by token, at full width: many sequences side by side, with the keys and values of the positions before in
//! a cache.
//!
//! All sequences are at the same position, so a step is a forward pass of `B` rows, and a sequence that has ended leaves
//! with [`Decoder::keep`]. The reference is [`RoutedModel::forward`] at sensitivity 1.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::ops::softmax_last_dim;

use super::RoutedModel;
use crate::ops::{AttentionShape, Rotary, SelfAttention, softcap};

/// Sequences in the making.
#[derive(Debug)]
pub struct Decoder<'a> {
    model: &'a RoutedModel,
    layers: Vec<Cache>,
    /// Of all positions that there may be.
    rotary: Rotary,
    /// Of layers with a window, if it is another one.
    local: Option<Rotary>,
    sequences: usize,
    /// Of the next token.
    position: usize,
    /// Positions that there may be.
    positions: usize,
}

/// Keys, turned, and values of one layer: each `(B, K, positions, d)`.
#[derive(Debug)]
struct Cache {
    keys: Tensor,
    values: Tensor,
}

impl<'a> Decoder<'a> {
    /// For `sequences` of at most `positions` tokens. The cache takes [`Decoder::bytes`] for each of them.
    ///
    /// # Errors
    /// The device's.
    pub fn new(model: &'a RoutedModel, sequences: usize, positions: usize) -> Result<Self> {
        let (config, device) = (model.config(), model.device());
        let shape = (sequences, config.num_key_value_heads, positions, config.head_dim);
        let zeros = || Tensor::zeros(shape, DType::F32, device);
        let caches = (0..config.num_hidden_layers).map(|_| Ok(Cache { keys: zeros()?, values: zeros()? }));
        Ok(Self {
            model,
            layers: caches.collect::<Result<_>>()?,
            rotary: Rotary::new(config, positions, device)?,
            local: Rotary::local(config, positions, device)?,
            sequences,
            position: 0,
            positions,
        })
    }

    /// Bytes that the cache takes for each sequence of `positions` tokens of such a model.
    pub fn bytes(config: &crate::ModelConfig, positions: usize) -> usize {
        4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions
    }

    /// Runs the next token of each sequence, `tokens (B)`. Returns the hidden states after the final norm, `(B, D)`.
    ///
    /// # Errors
    /// Another number of tokens, one outside the vocabulary, more tokens than there are positions.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Tensor> {
        if tokens.len() != self.sequences || self.position == self.positions {
            bail!(
                "decoder: expected {} tokens at one of {} positions, found {} at position {}",
                self.sequences,
                self.positions,
                tokens.len(),
                self.position
            );
        }
        let backbone = self.model.backbone();
        let tokens = Tensor::from_slice(tokens, (tokens.len(), 1), self.model.device())?;
        let rotary = at(&self.rotary, self.position)?;
        let local = self.local.as_ref().map(|local| at(local, self.position)).transpose()?;
        let mut x = backbone.embed(&tokens)?; // (B, D)
        for (layer, cache) in self.layers.iter_mut().enumerate() {
            let shape = backbone.attention_shape(layer, self.sequences, self.position + 1);
            let rotary = backbone.rotary(layer, &rotary, local.as_ref());
            x = backbone.layer_around(
                layer,
                &x,
                &mut |attention, x| cache.attend(attention, x, rotary, shape),
                &mut |normed| self.model.full_ffn(layer, normed),
            )?;
        }
        self.position += 1;
        backbone.norm(&x)
    }

    /// Goes on with these sequences only, in this order.
    ///
    /// # Errors
    /// A sequence that there is not.
    pub fn keep(&mut self, sequences: &[u32]) -> Result<()> {
        let kept = Tensor::from_slice(sequences, sequences.len(), self.model.device())?;
        for Cache { keys, values } in &mut self.layers {
            (*keys, *values) = (keys.index_select(&kept, 0)?, values.index_select(&kept, 0)?);
        }
        self.sequences = sequences.len();
        Ok(())
    }
}

impl Cache {
    /// [`SelfAttention::forward`] of the last of `shape.positions` positions, `x (B, D)` → `(B, D)`. Its keys and values
    /// are kept.
    fn attend(
        &self,
        attention: &SelfAttention,
        x: &Tensor,
        rotary: Option<&Rotary>,
        shape: AttentionShape,
    ) -> Result<Tensor> {
        let AttentionShape { sequences, positions, heads, kv_heads, head_dim, window, scale, cap } = shape;
        let [q, k, v] = attention.project(x, rotary)?;
        for (kept, new) in [(&self.keys, k), (&self.values, v)] {
            kept.slice_set(&new.reshape((sequences, kv_heads, 1, head_dim))?, 2, positions - 1)?;
        }
        let first = window.map_or(0, |window| positions.saturating_sub(window));
        let seen = |kept: &Tensor| kept.narrow(2, first, positions - first); // (B, K, seen, d)
        // query heads that share a key head are rows of one product
        let q = (q.reshape((sequences, kv_heads, heads / kv_heads, head_dim))? * f64::from(scale))?;
        let scores = softcap(q.matmul(&seen(&self.keys)?.t()?)?, cap)?; // (B, K, H / K, seen)
        let o = softmax_last_dim(&scores)?.matmul(&seen(&self.values)?)?; // (B, K, H / K, d)
        attention.output(x, &o.reshape((sequences, heads * head_dim))?)
    }
}

/// The table of one position.
fn at(rotary: &Rotary, position: usize) -> Result<Rotary> {
    let row = |table: &Tensor| table.narrow(0, position, 1)?.contiguous();
    Ok(Rotary { cos: row(&rotary.cos)?, sin: row(&rotary.sin)? })
}

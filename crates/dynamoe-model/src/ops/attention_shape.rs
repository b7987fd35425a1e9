//! What the rows and columns of queries, keys and values mean, and how scores are made.

use candle_core::{Result, Tensor, bail};

/// The meaning of rows and columns of q `(B·T, H·d)`, k and v `(B·T, K·d)`, and of scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// B: sequences.
    pub sequences: usize,
    /// T: positions of each sequence.
    pub positions: usize,
    /// H: query heads.
    pub heads: usize,
    /// K: key and value heads; `H / K` query heads share one.
    pub kv_heads: usize,
    /// d: numbers in a head.
    pub head_dim: usize,
    /// Largest number of keys that a query sees, its own included. None: all up to its own.
    pub window: Option<usize>,
    /// Scores are this times `q·k`; `1 / √d` in most models.
    pub scale: f32,
    /// `c`, where a score `s` becomes `c tanh(s / c)`.
    pub cap: Option<f32>,
}

impl AttentionShape {
    /// Rejects a shape that contradicts itself.
    pub(super) fn check(&self) -> Result<()> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) || self.window == Some(0) {
            bail!(
                "attention: expected heads a multiple of kv_heads and a window of 1 or more, found {self:?}"
            );
        }
        Ok(())
    }

    /// Rejects tensors of another shape.
    pub(super) fn check_tensors(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let Self { sequences, positions, heads, kv_heads, head_dim, .. } = *self;
        let (n, wide, narrow) = (sequences * positions, heads * head_dim, kv_heads * head_dim);
        if q.dims() != [n, wide] || k.dims() != [n, narrow] || v.dims() != [n, narrow] {
            bail!(
                "attention: expected q ({n}, {wide}), k and v ({n}, {narrow}), found {:?}, {:?}, {:?}",
                q.dims(),
                k.dims(),
                v.dims()
            );
        }
        self.check()
    }
}

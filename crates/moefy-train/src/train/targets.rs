//! The tokens that a batch's losses are taken on.

use candle_core::{Result, Tensor};

/// The tokens to be predicted.
pub(super) struct Targets<'a> {
    /// (N), u32.
    pub(super) tokens: &'a Tensor,
    /// 1 for a token that counts, else 0: (N), f32.
    pub(super) weights: &'a Tensor,
    /// What sums over tokens are divided by.
    pub(super) counted: f64,
}

/// Some of the [`Targets`], those from `first` on.
pub(super) struct Block {
    pub(super) first: usize,
    pub(super) tokens: Tensor,
    pub(super) weights: Tensor,
    counted: f64,
}

impl Targets<'_> {
    pub(super) fn block(&self, first: usize, rows: usize) -> Result<Block> {
        let rows = rows.min(self.tokens.dim(0)? - first);
        let (tokens, weights) = (self.tokens.narrow(0, first, rows)?, self.weights.narrow(0, first, rows)?);
        Ok(Block { first, tokens, weights, counted: self.counted })
    }
}

impl Block {
    /// The block's part of the mean loss: a scalar, of its tokens' weighted losses (N).
    pub(super) fn mean(&self, losses: &Tensor) -> Result<Tensor> {
        losses.sum_all()? / self.counted
    }
}

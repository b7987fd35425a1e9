//! Weighted cross entropy of each token: `weight · (logsumexp(logits) - logits[target])`.

use candle_core::{D, Result, Tensor};

/// `logits (N, V)`, `targets (N)` u32, `weights (N)` → losses `(N)` in nats.
///
/// # Errors
/// Shapes or dtypes that do not fit, a target outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    cross_entropy_composed(logits, targets, weights)
}

/// [`cross_entropy`] out of candle's operations.
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_composed(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let log_probabilities = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    log_probabilities.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?.mul(weights)
}

//! Matrix product with a weight as checkpoints store it: `y = x Wᵀ`.

use candle_core::{Result, Tensor};

/// `x (N, in)`, `w (out, in)` → `(N, out)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.matmul(&w.t()?)
}

//! Root mean square norm (arXiv 1910.07467): `y = x / sqrt(mean(x²) + eps) · w`, over the last dimension.

use candle_core::{D, Result, Tensor};

/// `x (N, D)`, `w (D)` → `(N, D)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    rms_norm_composed(x, w, eps)
}

/// [`rms_norm`] out of candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm_composed(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(w)
}

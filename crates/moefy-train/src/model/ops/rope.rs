//! Rotary position embedding, half-split as in Hugging Face's models.

use candle_core::{D, Result, Tensor};

use crate::model::Rotary;

/// Turns the heads of `x (N, heads·d)`, whose row `n` is at position `n mod T`; the tables give `T` and `d`.
///
/// # Errors
/// A width that is no multiple of `d`, or `N` that is no multiple of `T`.
pub fn rope(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    rope_composed(x, rotary)
}

/// [`rope`] out of candle's operations.
///
/// # Errors
/// As [`rope`].
pub fn rope_composed(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let (positions, half) = rotary.cos.dims2()?;
    let (n, width) = x.dims2()?;
    let x = x.reshape((n / positions, positions, width / (2 * half), 2 * half))?; // (B, T, heads, d)
    let cos = rotary.cos.reshape((1, positions, 1, half))?.to_dtype(x.dtype())?;
    let sin = rotary.sin.reshape((1, positions, 1, half))?.to_dtype(x.dtype())?;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_a, turned_b], D::Minus1)?.reshape((n, width))
}

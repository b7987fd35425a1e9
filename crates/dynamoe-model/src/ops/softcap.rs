//! Caps: `x` becomes `c tanh(x / c)`, which is `x` near zero and never reaches `c`.

use candle_core::{Result, Tensor};

/// Caps numbers, where there is a cap.
///
/// # Errors
/// candle's.
pub fn softcap(x: Tensor, cap: Option<f32>) -> Result<Tensor> {
    match cap.map(f64::from) {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x),
    }
}

//! Differentiable operations on token-major activations.
//!
//! Each has a composition of candle's own operations, `*_composed`, which runs on any device and is what the
//! tests compare with, and a fused form for f32 on the CPU, chosen by itself where it applies.

mod attention;
mod attention_cpu;
mod cpu;
mod cross_entropy;
mod linear;
mod linear_cross_entropy;
mod rms_norm;
mod rope;

pub use attention::{AttentionShape, attention, attention_composed};
pub use cross_entropy::{cross_entropy, cross_entropy_composed};
pub use linear::linear;
pub use linear_cross_entropy::linear_cross_entropy;
pub use rms_norm::{rms_norm, rms_norm_composed};
pub use rope::{rope, rope_composed};

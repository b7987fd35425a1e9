//! Differentiable operations on token-major activations.
//!
//! Each has a composition of candle's own operations, `*_composed`, which runs on any device and is what the
//! tests compare with, and a fused form for f32 on the CPU, chosen by itself where it applies. The large ones, which
//! cover many weights each, hand the weights' gradients to [`Gradients`] instead of candle.

mod attention;
mod attention_cpu;
mod cpu;
mod cross_entropy;
mod embedding;
mod experts;
mod ffn;
mod gradients;
mod linear;
mod linear_cross_entropy;
mod rms_norm;
mod rope;
mod rotary;
mod router;
mod self_attention;

pub(crate) use experts::expert_rows;

pub use cpu::composed;

pub use attention::{AttentionShape, attention, attention_composed};
pub use cross_entropy::{cross_entropy, cross_entropy_composed};
pub use embedding::embedding;
pub use ffn::{ffn, reach_of};
pub use gradients::{Gradient, Gradients};
pub use linear::linear;
pub use linear_cross_entropy::linear_cross_entropy;
pub use rms_norm::{rms_norm, rms_norm_composed};
pub use rope::{rope, rope_composed};
pub use rotary::Rotary;
pub use router::RouterWeights;
pub use self_attention::{Projection, SelfAttention};

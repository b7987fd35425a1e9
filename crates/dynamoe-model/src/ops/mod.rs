//! Differentiable operations on token-major activations.
//!
//! Each has two implementations. `*_composed` is a composition of candle's operations for any device, and the reference of
//! the tests. The other one is fused, for f32 on the CPU, and is used wherever it can be. The larger operations contain
//! many weights each; they hand the gradients with respect to these to [`Gradients`] instead of candle.

mod attention;
mod attention_cpu;
mod attention_shape;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod cpu;
mod cross_entropy;
mod embedding;
mod experts;
mod ffn;
mod gradients;
mod linear;
mod linear_cross_entropy;
mod product;
mod rms_norm;
mod rope;
mod rotary;
mod router;
mod self_attention;
mod softcap;

pub(crate) use experts::expert_rows;

pub use cpu::composed;

pub use attention::{attention, attention_composed};
pub use attention_shape::AttentionShape;
pub use cross_entropy::{cross_entropy, cross_entropy_composed};
pub use embedding::embedding;
pub use ffn::{ffn, reach_of};
pub use gradients::{Gradient, Gradients, PART};
pub use linear::linear;
pub use linear_cross_entropy::linear_cross_entropy;
pub use product::Precision;
pub use rms_norm::{Norm, rms_norm, rms_norm_composed};
pub use rope::{rope, rope_composed};
pub use rotary::Rotary;
pub use router::RouterWeights;
pub use self_attention::{Projection, SelfAttention};
pub use softcap::softcap;

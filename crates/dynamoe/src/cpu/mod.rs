//! Matrix products on a CPU, over packed weights.
//!
//! ```text
//! y = x · Wᵀ        x (T, K) f32, W (N, K) packed, y (T, N) f32
//! ```
//!
//! A [`PackedMatrix`] holds the blocks of a quantized matrix, those of 16 rows interleaved, so that one vector
//! holds the same four weights of 16 rows: a product then needs no sum across lanes, and the same layout serves
//! one token (the weights stream through once) and many (weights are unpacked once for a tile of tokens).
//! Inputs are rounded to 8 bits in the blocks that ggml uses, so results are those of candle's `QMatMul` up to
//! the order of a sum of floats. [`crate::PackedExperts`] runs a whole FFN over such matrices: one rounding of its
//! input, one wake-up of the threads.
//!
//! Results do not depend on the number of threads.
//!
//! ```
//! use candle_core::{Device, Module, Tensor, quantized::{GgmlDType, QTensor}};
//! use dynamoe::cpu::PackedMatrix;
//!
//! let weight = Tensor::randn(0f32, 1.0, (48, 512), &Device::Cpu)?;
//! let weight = PackedMatrix::from_qtensor(&QTensor::quantize(&weight, GgmlDType::Q4K)?)?;
//! let x = Tensor::randn(0f32, 1.0, (3, 512), &Device::Cpu)?;
//! assert_eq!(weight.forward(&x)?.dims(), [3, 48]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod encode;
mod format;
mod host;
mod input;
mod isa;
mod lanes;
mod loops;
mod matrix;
mod memory;
mod output;
mod pack;
mod parallel;
mod pool;
mod router;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod writer;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use format::Encoding;
pub(crate) use host::Host;
pub(crate) use input::{Input, TILE};
pub(crate) use isa::Isa;
pub(crate) use lanes::LANES;
pub(crate) use loops::Sums;
pub use matrix::PackedMatrix;
pub(crate) use matrix::groups_each;
pub(crate) use output::{Output, unset};
pub(crate) use parallel::{Phase, run};
pub(crate) use pool::lock;
pub(crate) use router::logits as router_logits;
pub(crate) use writer::Writer;

/// The name of the kernels that this processor runs, for logs: `avx512-vnni`, `avx2` or `portable`.
pub fn variant() -> &'static str {
    Isa::best().name()
}

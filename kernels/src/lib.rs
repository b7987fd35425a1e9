//! CUDA kernels of the DynaMoE FFN (arXiv 2502.12325): tokens are routed, and each gets its width, without the host
//! learning where they go. Launch shapes depend on tensor shapes only, so a layer can be captured in a CUDA graph.
//!
//! | path of a call | here | on the device |
//! | --- | --- | --- |
//! | checks of shapes, types and strides | `cuda` | |
//! | which kernel, how many blocks | [`plan`] | |
//! | arguments | [`args`] | `cu/args.h` |
//! | router and decision | | `cu/router.cuh` |
//! | 1 to 8 tokens | | `cu/decode.cuh`, `cu/decode_mma.cuh` |
//! | the same on GGUF blocks | | `cu/quantized.cuh` |
//! | many tokens | | `cu/sort.cuh`, `cu/prefill.cuh` |
//! | what each kernel computes | [`mod@reference`] | |
//!
//! Without the feature `cuda` there is only what needs no GPU: plans, arguments and references. `sim/` runs the
//! kernels on a CPU for the tests.
//!
//! Letters: `T` tokens, `D` hidden_size, `I` intermediate_size, `E` experts, `R` the router's hidden size.

pub mod args;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod plan;
pub mod reference;

/// Experts that the kernels can tell apart.
pub const MAX_EXPERTS: usize = 16;
/// Runs of neurons, [`args::Segment`], in one layer.
pub const MAX_SEGMENTS: usize = 16;

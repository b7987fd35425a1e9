//! CUDA kernels of the DynaMoE FFN (arXiv 2502.12325). The device routes tokens and gives each its width; the host does not
//! have to know the routes. Launches depend on tensor shapes only, so a layer can be captured in a CUDA graph.
//!
//! | path of a call | here | on the device |
//! | --- | --- | --- |
//! | checks of shapes, types and strides | `cuda` | |
//! | which kernel, how many blocks | [`plan`] | |
//! | arguments | [`args`] | `cu/args.h` |
//! | which weights serve which tokens | [`segments`] | `cu/segments.cuh` |
//! | names of the kernels | | `cu/dynamoe.cu` |
//! | router and decision | | `cu/router.cuh` |
//! | 1 to 8 tokens | | `cu/decode.cuh`, on tensor cores `cu/decode_mma.cuh` |
//! | 9 to 64 tokens | | `cu/few.cuh` |
//! | more tokens | | `cu/sort.cuh`, `cu/prefill.cuh`, on Hopper `cu/prefill_wgmma.cuh` and `cu/wgmma.cuh` |
//! | GGUF blocks, 1 to 8 tokens | | `cu/quantized.cuh` |
//! | GGUF blocks, more tokens | | `cu/sort.cuh`, `cu/prefill_quantized.cuh` |
//! | shared by all | | `cu/device.cuh` |
//! | what each kernel computes | [`mod@reference`] | |
//!
//! The feature `cuda` adds what needs a GPU; plans, arguments and references are always there. `sim/` runs the kernels on
//! a CPU for the tests.
//!
//! Letters: `T` tokens, `D` hidden_size, `I` intermediate_size, `E` experts, `R` the router's hidden size.

pub mod args;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod plan;
pub mod reference;
pub mod segments;

/// Experts that the kernels can tell apart.
pub const MAX_EXPERTS: usize = 16;
/// Runs of neurons, [`args::Segment`], in one layer: a shell for each expert, separate ones for all but the largest, and
/// one more if separate weights end in the middle of a run.
pub const MAX_SEGMENTS: usize = 2 * MAX_EXPERTS;

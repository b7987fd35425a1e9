//! Nested experts: expert `e` is the first `H_e` neurons of the FFN, so one set of weights serves all.
//!
//! ```text
//! h   = act(W_gate x) ∘ (W_up x)          (I)
//! O_e = W_down[:, :H_e] · h[:H_e]         the largest expert is the dense FFN
//! ```
//!
//! Shell `s` is the neurons `H_{s-1} .. H_s`; expert `e` is the sum of shells `0..=e`. Rows arrive sorted,
//! widest expert first, so that shell `s` serves the first `reach[s]` rows: a staircase.
//!
//! The smaller experts may have separate weights in the first shells, which the largest never uses: it is always the
//! dense FFN, and shares only the other shells with them.

mod glu;
mod packed;
mod prefixes;
mod projections;
mod shells;

use candle_core::{Result, Tensor};
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::Segments as CudaSegments;

pub use glu::Glu;
pub use packed::PackedExperts;
pub use prefixes::PrefixExperts;
pub use projections::Projections;
pub use shells::ShellExperts;

/// The weights of a layer's experts, dense or quantized.
pub trait NestedExperts: Send + Sync {
    /// `H_e` of every expert, strictly increasing.
    fn widths(&self) -> &[usize];

    /// Runs rows that are sorted by expert, widest first.
    ///
    /// `x (T, D)` → `(T, D)`; `reach[s]` is the number of rows whose expert is at least `s`, so `reach[0] = T`
    /// and the list never increases.
    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor>;

    /// The weights in runs of neurons, and the smaller experts' separate ones, if they lie on a CUDA device in a form that
    /// dynamoe-kernels may know. Returning `None` is always correct; on CUDA the layer then has to wait for its routes.
    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<CudaSegments> {
        None
    }

    /// Runs rows in any order: `order` lists all rows of `x (T, D)`, widest expert first; `reach` as for
    /// [`NestedExperts::forward`]. Results are in the order of `x`.
    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        self.forward(&rows(x, order)?, reach)?.index_select(&Tensor::new(inverse(order), x.device())?, 0)
    }

    /// Runs rows whose experts are all smaller than the largest on the smaller experts' separate weights. `None` if
    /// these have none, and every expert is a prefix of the dense FFN.
    ///
    /// `order` lists rows of `x (T, D)`, widest expert first; results are in that order. `reach` is as for
    /// [`NestedExperts::forward`], without the largest expert's.
    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>>;
}

/// The rows `order` of `x (T, D)`; `x` itself where these are all its rows in their order.
pub fn rows(x: &Tensor, order: &[u32]) -> Result<Tensor> {
    if order.len() == x.dim(0)? && order.iter().enumerate().all(|(place, &row)| place == row as usize) {
        return Ok(x.clone());
    }
    x.contiguous()?.index_select(&Tensor::new(order, x.device())?, 0)
}

/// Where each row stands in `order`.
pub(crate) fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0u32; order.len()];
    for (place, &row) in order.iter().enumerate() {
        inverse[row as usize] = place as u32;
    }
    inverse
}

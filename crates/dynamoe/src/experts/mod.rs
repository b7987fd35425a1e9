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
//! Tokens below full width may have other neurons in the first shells, narrow experts' own: then the largest expert is
//! still the dense FFN, and shares only the other shells with them.

mod glu;
mod packed;
mod prefixes;
mod shells;

use candle_core::{Result, Tensor};
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::Segment as CudaSegment;

pub use glu::Glu;
pub use packed::PackedExperts;
pub use prefixes::PrefixExperts;
pub use shells::{Shell, ShellExperts};

/// The weights of a layer's experts, dense or quantized.
pub trait NestedExperts: Send + Sync {
    /// `H_e` of every expert, strictly increasing.
    fn widths(&self) -> &[usize];

    /// Runs rows that are sorted by expert, widest first.
    ///
    /// `x (T, D)` → `(T, D)`; `reach[s]` is the number of rows whose expert is at least `s`, so `reach[0] = T`
    /// and the list never increases.
    ///
    /// # Errors
    /// candle's.
    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor>;

    /// The weights in runs of neurons, if they lie on a CUDA device in a form that dynamoe-kernels may know. None
    /// is always right, and costs a layer on CUDA a wait for its routes.
    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<Vec<CudaSegment>> {
        None
    }

    /// Runs rows in any order: `order` lists all rows of `x (T, D)`, widest expert first; `reach` as for
    /// [`NestedExperts::forward`]. Results are in the order of `x`.
    ///
    /// # Errors
    /// candle's.
    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        let sorted = x.index_select(&Tensor::new(order, x.device())?, 0)?;
        self.forward(&sorted, reach)?.index_select(&Tensor::new(places(order), x.device())?, 0)
    }

    /// How many of the first shells are others for tokens below full width.
    fn own_shells(&self) -> usize {
        0
    }

    /// The experts of tokens below full width, where these are a set of their own.
    fn narrow_experts(&self) -> Option<&dyn NestedExperts> {
        None
    }

    /// Runs rows below full width, sorted by expert, widest first; `reach` as for [`NestedExperts::forward`], without
    /// the largest expert's.
    ///
    /// # Errors
    /// candle's.
    fn forward_narrow(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match self.narrow_experts() {
            Some(narrow) => narrow.forward(x, reach),
            None => self.forward(x, &[reach, &[0]].concat()),
        }
    }
}

/// Where each row stands in `order`.
pub(crate) fn places(order: &[u32]) -> Vec<u32> {
    let mut places = vec![0u32; order.len()];
    for (place, &row) in order.iter().enumerate() {
        places[row as usize] = place as u32;
    }
    places
}

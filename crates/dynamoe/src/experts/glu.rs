//! What stands between an FFN's projections: `act(gate) ∘ up`.

use candle_core::{Result, Tensor};
use candle_nn::{Activation, Module};

/// `act(gate) ∘ up`, both `(…, n)`.
pub type Glu = fn(&Tensor, &Tensor, Activation) -> Result<Tensor>;

/// [`Glu`] made of candle's operations.
pub(super) fn glu(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    activation.forward(gate)? * up
}

/// Whether the CUDA kernels know the activation.
#[cfg(feature = "cuda")]
pub(super) fn is_silu(activation: Activation) -> bool {
    matches!(activation, Activation::Silu | Activation::Swish)
}

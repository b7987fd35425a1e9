//! Matrix product with a weight as checkpoints store it: `y = x Wᵀ`.
//!
//! candle's own gradient of `x.matmul(&w.t()?)` is computed for the transposed weight and copied back, number
//! by number; here `dx = g W` and `dW = gᵀ x` come out as they are needed.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

/// `x (N, in)`, `w (out, in)` → `(N, out)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.apply_op2(w, Linear)
}

struct Linear;

impl Linear {
    /// The same on any device: the devices' products take strided operands.
    fn forward<S: BackendStorage>(&self, x: &S, x_at: &Layout, w: &S, w_at: &Layout) -> Result<(S, Shape)> {
        let (n, from) = x_at.shape().dims2()?;
        let (out, w_from) = w_at.shape().dims2()?;
        if from != w_from {
            bail!("linear: expected rows of {w_from} numbers for a weight ({out}, {w_from}), found {from}");
        }
        let y = x.matmul(w, (1, n, out, from), x_at, &w_at.transpose(0, 1)?)?;
        Ok((y, Shape::from((n, out))))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        w: &CpuStorage,
        w_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(x, x_at, w, w_at)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        w: &CudaStorage,
        w_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward(x, x_at, w, w_at)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = if x.track_op() { Some(g.matmul(&w.detach())?) } else { None };
        let dw = if w.track_op() { Some(g.t()?.matmul(&x.detach())?) } else { None };
        Ok((dx, dw))
    }
}

//! Matrix product with a weight as checkpoints store it: `y = x Wᵀ`, `dx = g W`, `dW = gᵀ x`.
//!
//! On the CPU faer multiplies: its AVX-512 kernels are twice as fast as candle's AVX2 ones. Another reason not to use
//! `x.matmul(&w.t()?)` is its gradient, which candle computes for the transposed weight and then copies back.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::Accum;

use super::cpu::{fusable, matrix, read, slice};
use super::gradients::add_gradient;
use super::product::multiply_blocks;

/// `x (N, in)`, `w (out, in)` → `(N, out)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((_, from), (out, w_from)) = (x.dims2()?, w.dims2()?);
    if from != w_from {
        bail!("linear: expected rows of {w_from} numbers for a weight ({out}, {w_from}), found {from}");
    }
    x.contiguous()?.apply_op2(&w.contiguous()?, Linear)
}

/// The operation.
struct Linear;

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
        let ((n, from), (out, _)) = (x_at.shape().dims2()?, w_at.shape().dims2()?);
        let (CpuStorage::F32(_), CpuStorage::F32(_)) = (x, w) else {
            let y = x.matmul(w, (1, n, out, from), x_at, &w_at.transpose(0, 1)?)?;
            return Ok((y, Shape::from((n, out))));
        };
        let mut y = vec![0f32; n * out];
        let w = matrix(slice(w, w_at)?, from).transpose();
        multiply_blocks(&mut y, Accum::Replace, matrix(slice(x, x_at)?, from), w);
        Ok((CpuStorage::F32(y), Shape::from((n, out))))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        w: &CudaStorage,
        w_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let ((n, from), (out, _)) = (x_at.shape().dims2()?, w_at.shape().dims2()?);
        let y = x.matmul(w, (1, n, out, from), x_at, &w_at.transpose(0, 1)?)?;
        Ok((y, Shape::from((n, out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, from) = x.dims2()?;
        let out = w.dim(0)?;
        let x_grad = x.track_op();
        if !fusable(&[x, w, g]) {
            let dx = x_grad.then(|| g.matmul(&w.detach())).transpose()?;
            return Ok((dx, w.track_op().then(|| g.t()?.matmul(&x.detach())).transpose()?));
        }
        read([x, w, g], |[x_values, w_values, g]| {
            let g = matrix(g, out);
            let dx = if x_grad {
                let mut dx = vec![0f32; n * from];
                multiply_blocks(&mut dx, Accum::Replace, g, matrix(w_values, from));
                Some(Tensor::from_vec(dx, (n, from), x.device())?)
            } else {
                None
            };
            let dw = add_gradient(w, |dw, accum| {
                multiply_blocks(dw, accum, g.transpose(), matrix(x_values, from));
            })?;
            Ok((dx, dw))
        })
    }
}

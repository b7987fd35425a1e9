//! Matrix product with a weight as checkpoints store it: `y = x Wᵀ`, `dx = g W`, `dW = gᵀ x`.
//!
//! On the CPU faer multiplies: its AVX-512 kernels are twice as fast as candle's AVX2 ones. candle's own
//! gradient of `x.matmul(&w.t()?)` is moreover computed for the transposed weight and copied back, number by
//! number.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::cpu::{fusable, read, slice};

/// `x (N, in)`, `w (out, in)` → `(N, out)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((_, from), (out, w_from)) = (x.dims2()?, w.dims2()?);
    if from != w_from {
        bail!("linear: expected rows of {w_from} numbers for a weight ({out}, {w_from}), found {from}");
    }
    if fusable(&[x, w]) {
        return x.contiguous()?.apply_op2(&w.contiguous()?, Linear);
    }
    x.apply_op2(w, Linear)
}

/// `a b` in row-major order, blocks of rows in parallel. Blocks do not depend on the number of threads, hence
/// neither do the results.
fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let (rows, columns) = (a.nrows(), b.ncols());
    let block = (rows / 4).clamp(32, 128);
    let mut c = vec![0f32; rows * columns];
    c.par_chunks_mut((block * columns).max(1)).enumerate().for_each(|(index, c)| {
        let rows = c.len() / columns;
        let a = a.subrows(index * block, rows);
        matmul(MatMut::from_row_major_slice_mut(c, rows, columns), Accum::Replace, a, b, 1.0, Par::Seq);
    });
    c
}

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
        let x = MatRef::from_row_major_slice(slice(x, x_at)?, n, from);
        let w = MatRef::from_row_major_slice(slice(w, w_at)?, out, from);
        Ok((CpuStorage::F32(product(x, w.transpose())), Shape::from((n, out))))
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
        let (x_grad, w_grad) = (x.track_op(), w.track_op());
        if !fusable(&[x, w, g]) {
            let dx = x_grad.then(|| g.matmul(&w.detach())).transpose()?;
            return Ok((dx, w_grad.then(|| g.t()?.matmul(&x.detach())).transpose()?));
        }
        let (dx, dw) = read([x, w, g], |[x, w, g]| {
            let g = MatRef::from_row_major_slice(g, n, out);
            let dx = x_grad.then(|| product(g, MatRef::from_row_major_slice(w, out, from)));
            Ok((dx, w_grad.then(|| product(g.transpose(), MatRef::from_row_major_slice(x, n, from)))))
        })?;
        let tensor = |of: &Tensor, values| Tensor::from_vec(values, of.shape(), of.device());
        Ok((dx.map(|dx| tensor(x, dx)).transpose()?, dw.map(|dw| tensor(w, dw)).transpose()?))
    }
}

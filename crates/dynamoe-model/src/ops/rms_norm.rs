//! Root mean square norm (arXiv 1910.07467): `y = x r ∘ s` with `r = 1 / sqrt(mean(x²) + eps)`, row by row, and
//! `s = offset + w`.
//!
//! With `n = x r` and the gradient `g` with respect to `y`: `dw = Σ_rows g ∘ n`, `dx = r (g ∘ s - n mean(g ∘ s ∘ n))`.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{add_parts, dot, fusable, mul_add, read, rows_per_task, slice, sum};
use super::gradients::add_gradient;

/// What norms have besides weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Added to the mean square.
    pub eps: f64,
    /// Added to the weights: 1 for Gemma, else 0.
    pub offset: f64,
}

/// `x (N, D)`, `w (D)` → `(N, D)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, norm: Norm) -> Result<Tensor> {
    if x.dim(D::Minus1)? != w.dims1()? {
        bail!("rms_norm: expected rows of {} numbers, found {:?}", w.dims1()?, x.dims());
    }
    if fusable(&[x, w]) {
        return x.contiguous()?.apply_op2(&w.contiguous()?, RmsNorm { norm });
    }
    rms_norm_composed(x, w, norm)
}

/// [`rms_norm`], composed of candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm_composed(x: &Tensor, w: &Tensor, norm: Norm) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + norm.eps)?.sqrt()?;
    let scale = if norm.offset == 0.0 { w.clone() } else { (w + norm.offset)? };
    x.broadcast_div(&rms)?.broadcast_mul(&scale)
}

/// `r` of a row.
fn scale(x: &[f32], norm: Norm) -> f32 {
    (sum(x, |x| x * x) / x.len() as f32 + norm.eps as f32).sqrt().recip()
}

/// [`rms_norm`] of some rows.
pub(super) fn norm_rows(x: &[f32], w: &[f32], norm: Norm, y: &mut [f32]) {
    let offset = norm.offset as f32;
    for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
        let r = scale(x, norm);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * (offset + w);
        }
    }
}

/// Turns `g`, the gradient with respect to the result of some rows, into that with respect to `x`. Adds the gradient with
/// respect to `w` to `dw`.
pub(super) fn norm_rows_backward(x: &[f32], w: &[f32], norm: Norm, g: &mut [f32], dw: &mut [f32]) {
    let (d, offset) = (w.len(), norm.offset as f32);
    for (x, g) in x.chunks_exact(d).zip(g.chunks_exact_mut(d)) {
        let r = scale(x, norm);
        for ((dw, g), x) in dw.iter_mut().zip(&*g).zip(x) {
            *dw = mul_add(g * r, *x, *dw);
        }
        g.iter_mut().zip(w).for_each(|(g, w)| *g *= offset + w);
        let mean = r * r * dot(g, x) / d as f32;
        for (g, x) in g.iter_mut().zip(x) {
            *g = r * mul_add(-mean, *x, *g);
        }
    }
}

/// The operation.
struct RmsNorm {
    norm: Norm,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        w: &CpuStorage,
        w_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(x, x_at)?, slice(w, w_at)?);
        let task = rows_per_task(w.len()) * w.len();
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| norm_rows(x, w, self.norm, y));
        Ok((CpuStorage::F32(y), x_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        read([x, w, g], |[x_values, w_values, g]| {
            let (d, task) = (w_values.len(), rows_per_task(w_values.len()) * w_values.len());
            let mut dx = g.to_vec();
            let parts: Vec<Vec<f32>> = dx
                .par_chunks_mut(task)
                .zip(x_values.par_chunks(task))
                .map(|(g, x)| {
                    let mut dw = vec![0f32; d];
                    norm_rows_backward(x, w_values, self.norm, g, &mut dw);
                    dw
                })
                .collect();
            let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
            Ok((Some(dx), add_gradient(w, |dw, accum| add_parts(&parts, dw, accum))?))
        })
    }
}

//! Root mean square norm (arXiv 1910.07467): `y = x r ∘ w` with `r = 1 / sqrt(mean(x²) + eps)`, row by row.
//!
//! With `n = x r` and the gradient `g`: `dw = Σ_rows g ∘ n`, `dx = r (g ∘ w - n mean(g ∘ w ∘ n))`.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{axpy, fusable, mul_add, read, rows_per_task, slice, sum};

/// `x (N, D)`, `w (D)` → `(N, D)`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    if x.dim(D::Minus1)? != w.dims1()? {
        bail!("rms_norm: expected rows of {} numbers, found {:?}", w.dims1()?, x.dims());
    }
    if fusable(&[x, w]) {
        return x.contiguous()?.apply_op2(&w.contiguous()?, RmsNorm { eps: eps as f32 });
    }
    rms_norm_composed(x, w, eps)
}

/// [`rms_norm`] out of candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn rms_norm_composed(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(w)
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    /// `r` of a row.
    fn scale(&self, x: &[f32]) -> f32 {
        (sum(x, |x| x * x) / x.len() as f32 + self.eps).sqrt().recip()
    }

    /// `dx` of some rows into `dx`; their part of `dw` is returned.
    fn backward_rows(&self, x: &[f32], w: &[f32], g: &[f32], dx: &mut [f32]) -> Vec<f32> {
        let d = w.len();
        let mut dw = vec![0f32; d];
        for ((x, g), dx) in x.chunks_exact(d).zip(g.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let r = self.scale(x);
            for j in 0..d {
                dx[j] = g[j] * x[j]; // for now: g ∘ n / r
            }
            axpy(&mut dw, r, dx);
            let mean = r * super::cpu::dot(dx, w) / d as f32;
            for j in 0..d {
                dx[j] = r * mul_add(-(r * mean), x[j], g[j] * w[j]);
            }
        }
        dw
    }
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
        let (d, task) = (w.len(), rows_per_task(w.len()) * w.len());
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                let r = self.scale(x);
                for j in 0..d {
                    y[j] = x[j] * r * w[j];
                }
            }
        });
        Ok((CpuStorage::F32(y), x_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = read([x, w, g], |[x, w, g]| {
            let task = rows_per_task(w.len()) * w.len();
            let mut dx = vec![0f32; x.len()];
            let parts: Vec<Vec<f32>> = dx
                .par_chunks_mut(task)
                .zip(x.par_chunks(task).zip(g.par_chunks(task)))
                .map(|(dx, (x, g))| self.backward_rows(x, w, g, dx))
                .collect();
            let mut dw = vec![0f32; w.len()];
            parts.iter().for_each(|part| axpy(&mut dw, 1.0, part));
            Ok((dx, dw))
        })?;
        let cpu = x.device();
        Ok((Some(Tensor::from_vec(dx, x.shape(), cpu)?), Some(Tensor::from_vec(dw, w.shape(), cpu)?)))
    }
}

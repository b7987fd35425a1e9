//! The output matrix and the loss in one: `cross_entropy(x Wᵀ, targets, weights)` without the logits.
//!
//! For a large vocabulary the logits `(N, V)` are by far the largest tensor of a step. Here some columns at a
//! time are computed, while they fit the cache: once for the log-sum-exp, once more for the gradients.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::cpu::{axpy, exp, fusable, max, read, slice, sum};
use super::cross_entropy::{check, cross_entropy};
use super::linear::linear;

/// Vocabularies from this size on are worth computing the logits twice.
const LARGE: usize = 4096;
/// Logits of a token that are computed at once.
const CHUNK: usize = 512;
/// Tasks of the backward pass; each holds a part of the gradient of `x`.
const TASKS: usize = 16;

/// `x (N, D)`, `w (V, D)`, `targets (N)` u32, `weights (N)` → losses `(N)` in nats. The weights get no gradient.
///
/// # Errors
/// Shapes or dtypes that do not fit, a target outside the vocabulary.
pub fn linear_cross_entropy(x: &Tensor, w: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let ((n, d), (v, w_d)) = (x.dims2()?, w.dims2()?);
    if v < LARGE || !fusable(&[x, w, weights]) || !targets.device().is_cpu() {
        return cross_entropy(&linear(x, w)?, targets, weights);
    }
    if d != w_d {
        bail!("linear_cross_entropy: expected rows of {w_d} numbers, found {d}");
    }
    check((n, v), targets, weights)?;
    let (targets, weights) = (targets.to_vec1()?, weights.to_vec1()?);
    let op = LinearCrossEntropy { targets, weights, log_sums: OnceLock::new() };
    x.contiguous()?.apply_op2(&w.contiguous()?, op)
}

struct LinearCrossEntropy {
    targets: Vec<u32>,
    weights: Vec<f32>,
    /// `logsumexp` of each row, kept for the gradient.
    log_sums: OnceLock<Vec<f32>>,
}

/// What some columns contribute to each row.
struct Part {
    max: Vec<f32>,
    /// `Σ e^(logit - max)`
    sum: Vec<f32>,
    /// The target's logit where it is among the columns, else 0.
    target: Vec<f32>,
}

impl LinearCrossEntropy {
    /// The column of row `n`'s target, if it is among `columns` columns from `first` on.
    fn target(&self, n: usize, first: usize, columns: usize) -> Option<usize> {
        (self.targets[n] as usize).checked_sub(first).filter(|&column| column < columns)
    }

    fn forward_part(&self, x: MatRef<'_, f32>, w: MatRef<'_, f32>, first: usize) -> Part {
        let columns = w.nrows();
        let logits = logits(x, w);
        let rows = || logits.chunks_exact(columns);
        let max: Vec<f32> = rows().map(max).collect();
        let sum = rows().zip(&max).map(|(row, &max)| sum(row, |x| exp(x - max))).collect();
        let target = |(n, row): (usize, &[f32])| self.target(n, first, columns).map_or(0.0, |at| row[at]);
        Part { sum, target: rows().enumerate().map(target).collect(), max }
    }

    /// Adds to `dx (N, D)` and writes `dw` for the rows of `w`, which start at row `first` of the matrix.
    fn backward_part(
        &self,
        (x, w, first): (MatRef<'_, f32>, MatRef<'_, f32>, usize),
        scales: &[f32],
        log_sums: &[f32],
        (dx, dw): (&mut [f32], &mut [f32]),
    ) {
        let ((n, d), columns) = ((x.nrows(), x.ncols()), w.nrows());
        let mut g = logits(x, w);
        for (n, row) in g.chunks_exact_mut(columns).enumerate() {
            row.iter_mut().for_each(|x| *x = scales[n] * exp(*x - log_sums[n]));
            if let Some(at) = self.target(n, first, columns) {
                row[at] -= scales[n];
            }
        }
        let g = MatRef::from_row_major_slice(&g, n, columns);
        matmul(MatMut::from_row_major_slice_mut(dx, n, d), Accum::Add, g, w, 1.0, Par::Seq);
        let dw = MatMut::from_row_major_slice_mut(dw, columns, d);
        matmul(dw, Accum::Replace, g.transpose(), x, 1.0, Par::Seq);
    }
}

/// `x wᵀ`, row-major.
fn logits(x: MatRef<'_, f32>, w: MatRef<'_, f32>) -> Vec<f32> {
    let mut logits = vec![0f32; x.nrows() * w.nrows()];
    let to = MatMut::from_row_major_slice_mut(&mut logits, x.nrows(), w.nrows());
    matmul(to, Accum::Replace, x, w.transpose(), 1.0, Par::Seq);
    logits
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        w: &CpuStorage,
        w_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, d) = x_at.shape().dims2()?;
        let (x, w) = (MatRef::from_row_major_slice(slice(x, x_at)?, n, d), slice(w, w_at)?);
        let parts: Vec<Part> = w
            .par_chunks(CHUNK * d)
            .enumerate()
            .map(|(chunk, w)| {
                let w = MatRef::from_row_major_slice(w, w.len() / d, d);
                self.forward_part(x, w, chunk * CHUNK)
            })
            .collect();
        let log_sums: Vec<f32> = (0..n)
            .map(|n| {
                let max = parts.iter().map(|part| part.max[n]).fold(f32::NEG_INFINITY, f32::max);
                max + parts.iter().map(|part| part.sum[n] * exp(part.max[n] - max)).sum::<f32>().ln()
            })
            .collect();
        let target = |n: usize| parts.iter().map(|part| part.target[n]).sum::<f32>();
        let losses = (0..n).map(|n| self.weights[n] * (log_sums[n] - target(n))).collect();
        // An operation runs forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(losses), Shape::from(n)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _losses: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((n, d), v) = (x.dims2()?, w.dim(0)?);
        let Some(log_sums) = self.log_sums.get() else {
            bail!("linear_cross_entropy: expected the forward pass to run first");
        };
        let (dx, dw) = read([x, w, g], |[x, w, g]| {
            let scales: Vec<f32> = g.iter().zip(&self.weights).map(|(g, weight)| g * weight).collect();
            let x = MatRef::from_row_major_slice(x, n, d);
            let rows = v.div_ceil(TASKS);
            let mut dw = vec![0f32; v * d];
            let tasks = dw.par_chunks_mut(rows * d).zip(w.par_chunks(rows * d)).enumerate();
            let parts: Vec<Vec<f32>> = tasks
                .map(|(task, (dw, w))| {
                    let mut dx = vec![0f32; n * d];
                    for (chunk, (dw, w)) in dw.chunks_mut(CHUNK * d).zip(w.chunks(CHUNK * d)).enumerate() {
                        let w = MatRef::from_row_major_slice(w, w.len() / d, d);
                        let first = task * rows + chunk * CHUNK;
                        self.backward_part((x, w, first), &scales, log_sums, (&mut dx, dw));
                    }
                    dx
                })
                .collect();
            let mut dx = vec![0f32; n * d];
            parts.iter().for_each(|part| axpy(&mut dx, 1.0, part));
            Ok((dx, dw))
        })?;
        let cpu = x.device();
        Ok((Some(Tensor::from_vec(dx, (n, d), cpu)?), Some(Tensor::from_vec(dw, (v, d), cpu)?)))
    }
}

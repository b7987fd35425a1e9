//! The output matrix and the loss as one operation: `cross_entropy(x Wᵀ, targets, weights)`. Logits `z` may be capped to
//! `c tanh(z / c)`, whose slope is `1 - (capped / c)²`.
//!
//! A small vocabulary is computed by rows: a block's logits become their gradient while they are in the cache. With a
//! large vocabulary, the logits `(N, V)` are the largest tensor of a step and `W` is the largest weight. So it is computed
//! by columns, each for all rows. Up to [`KEPT`] logits are kept for the backward pass, which computes the others again.

use std::sync::{Mutex, OnceLock};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::cpu::{add_parts, exp, fusable, lock, matrix, max, read, rows_per_block, slice, sum, tanh};
use super::cross_entropy::{check, cross_entropy};
use super::gradients::add_gradient;
use super::linear::linear;
use super::product::{Factor, multiply_blocks};
use super::softcap::softcap;

/// Vocabularies from this size on are computed by columns.
const LARGE: usize = 4096;
/// Columns that are computed at once.
const CHUNK: usize = 512;
/// Tasks of a large vocabulary. Each computes a part of the gradient with respect to `x`.
const TASKS: usize = 16;
/// Logits that are kept for the backward pass at most: 256 MB.
const KEPT: usize = 1 << 26;

/// `x (N, D)`, `w (V, D)`, `targets (N)` u32, `weights (N)` → losses `(N)` in nats. `weights` get no gradient.
/// Logits are capped by `cap`, if there is one.
///
/// # Errors
/// Shapes or dtypes that do not fit, a target outside the vocabulary.
pub fn linear_cross_entropy(
    x: &Tensor,
    w: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    cap: Option<f32>,
) -> Result<Tensor> {
    let ((n, d), (v, w_d)) = (x.dims2()?, w.dims2()?);
    if !fusable(&[x, w, weights]) || !targets.device().is_cpu() {
        return cross_entropy(&softcap(linear(x, w)?, cap)?, targets, weights);
    }
    if d != w_d {
        bail!("linear_cross_entropy: expected rows of {w_d} numbers, found {d}");
    }
    check((n, v), targets, weights)?;
    let keep = x.track_op() || w.track_op();
    let tokens = Tokens { targets: targets.to_vec1()?, weights: weights.to_vec1()?, cap: Cap(cap) };
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    if v < LARGE {
        x.apply_op2(&w, ByRows { tokens, keep, gradient: Mutex::new(None) })
    } else {
        x.apply_op2(&w, ByColumns { tokens, keep, saved: OnceLock::new() })
    }
}

/// Targets and weights of the rows, and the cap of all logits.
struct Tokens {
    targets: Vec<u32>,
    weights: Vec<f32>,
    cap: Cap,
}

/// The cap of logits, if there is one.
#[derive(Clone, Copy)]
struct Cap(Option<f32>);

impl Cap {
    /// Caps logits.
    fn apply(self, logits: &mut [f32]) {
        if let Some(cap) = self.0 {
            logits.iter_mut().for_each(|z| *z = cap * tanh(*z / cap));
        }
    }

    /// The slope at each of these capped logits; none without a cap.
    fn slopes(self, capped: &[f32]) -> Option<Vec<f32>> {
        let slope = |cap: f32| capped.iter().map(move |z| 1.0 - (z / cap) * (z / cap));
        self.0.map(|cap| slope(cap).collect())
    }
}

/// Turns the gradient with respect to capped logits into that before the cap.
fn through_cap(gradient: &mut [f32], slopes: Option<Vec<f32>>) {
    if let Some(slopes) = slopes {
        gradient.iter_mut().zip(slopes).for_each(|(g, slope)| *g *= slope);
    }
}

/// The operation for a small vocabulary.
struct ByRows {
    tokens: Tokens,
    /// Whether there may be a backward pass.
    keep: bool,
    /// The losses' gradient with respect to the logits, `(N, V)`.
    gradient: Mutex<Option<Vec<f32>>>,
}

impl ByRows {
    /// Turns rows of logits into their gradients and fills in the losses.
    fn losses(&self, first: usize, logits: &mut [f32], v: usize, losses: &mut [f32]) {
        for ((n, row), loss) in (first..).zip(logits.chunks_exact_mut(v)).zip(losses) {
            let (target, weight) = (self.tokens.targets[n] as usize, self.tokens.weights[n]);
            self.tokens.cap.apply(row);
            let (max, logit) = (max(row), row[target]);
            let slopes = if self.keep { self.tokens.cap.slopes(row) } else { None };
            row.iter_mut().for_each(|x| *x = exp(*x - max));
            let total = sum(row, |p| p);
            *loss = weight * (max + total.ln() - logit);
            if self.keep {
                let factor = weight / total;
                row.iter_mut().for_each(|p| *p *= factor);
                row[target] -= weight;
                through_cap(row, slopes);
            }
        }
    }
}

impl CustomOp2 for ByRows {
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
        let ((n, d), v) = (x_at.shape().dims2()?, w_at.shape().dims2()?.0);
        let (x, w, rows) = (slice(x, x_at)?, slice(w, w_at)?, rows_per_block(n));
        let factor = Factor::new(matrix(w, d).transpose());
        let logits = |x: &[f32], to: &mut [f32]| {
            factor.multiply(to, Accum::Replace, matrix(x, d));
        };
        let mut losses = vec![0f32; n];
        let tasks = losses.par_chunks_mut(rows).zip(x.par_chunks(rows * d)).enumerate();
        if self.keep {
            let mut gradient = vec![0f32; n * v];
            tasks.zip(gradient.par_chunks_mut(rows * v)).for_each(|((task, (losses, x)), to)| {
                logits(x, to);
                self.losses(task * rows, to, v, losses);
            });
            *lock(&self.gradient) = Some(gradient);
        } else {
            tasks.for_each(|(task, (losses, x))| {
                let mut to = vec![0f32; losses.len() * v];
                logits(x, &mut to);
                self.losses(task * rows, &mut to, v, losses);
            });
        }
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
        let Some(mut gradient) = lock(&self.gradient).take() else {
            bail!("linear_cross_entropy: expected one forward pass, then one backward pass");
        };
        read([x, w, g], |[x_values, w_values, g]| {
            let rows = rows_per_block(n);
            let mut dx = vec![0f32; n * d];
            let w_factor = Factor::new(matrix(w_values, d));
            let tasks = dx.par_chunks_mut(rows * d).zip(gradient.par_chunks_mut(rows * v));
            tasks.zip(g.par_chunks(rows)).for_each(|((dx, gradient), g)| {
                for (row, g) in gradient.chunks_exact_mut(v).zip(g) {
                    row.iter_mut().for_each(|x| *x *= g);
                }
                w_factor.multiply(dx, Accum::Replace, matrix(gradient, v));
            });
            let dw = add_gradient(w, |dw, accum| {
                multiply_blocks(dw, accum, matrix(&gradient, v).transpose(), matrix(x_values, d));
            })?;
            Ok((Some(Tensor::from_vec(dx, (n, d), x.device())?), dw))
        })
    }
}

/// The operation for a large vocabulary.
struct ByColumns {
    tokens: Tokens,
    /// Whether there may be a backward pass.
    keep: bool,
    saved: OnceLock<Saved>,
}

/// What the forward pass leaves for the backward pass.
struct Saved {
    /// `logsumexp` of each row.
    log_sums: Vec<f32>,
    /// The logits of each task's first chunks.
    logits: Vec<Mutex<Vec<Vec<f32>>>>,
}

/// What some columns contribute to each row.
struct Part {
    /// The largest logit.
    max: Vec<f32>,
    /// `Σ e^(logit - max)`
    sum: Vec<f32>,
    /// The target's logit if it is among the columns, else 0.
    target: Vec<f32>,
}

/// Rows of `W`, the columns of the logits, that one task takes.
fn rows_of_task(v: usize) -> usize {
    v.div_ceil(TASKS)
}

/// `x wᵀ`, row-major.
fn logits(x: MatRef<'_, f32>, w: MatRef<'_, f32>) -> Vec<f32> {
    let mut logits = vec![0f32; x.nrows() * w.nrows()];
    Factor::new(w.transpose()).multiply(&mut logits, Accum::Replace, x);
    logits
}

impl ByColumns {
    /// The column of row `n`'s target, counted from `first`, if it is among the next `columns` columns.
    fn target(&self, n: usize, first: usize, columns: usize) -> Option<usize> {
        (self.tokens.targets[n] as usize).checked_sub(first).filter(|&column| column < columns)
    }

    /// What the `columns` columns from `first` on contribute.
    fn part(&self, logits: &[f32], columns: usize, first: usize) -> Part {
        let rows = || logits.chunks_exact(columns);
        let max: Vec<f32> = rows().map(max).collect();
        let sum = rows().zip(&max).map(|(row, &max)| sum(row, |x| exp(x - max))).collect();
        let target = |(n, row): (usize, &[f32])| self.target(n, first, columns).map_or(0.0, |at| row[at]);
        Part { sum, target: rows().enumerate().map(target).collect(), max }
    }

    /// A task's parts, and the logits that it keeps.
    fn forward_task(&self, x: MatRef<'_, f32>, w: &[f32], first: usize) -> (Vec<Part>, Vec<Vec<f32>>) {
        let (mut parts, mut kept) = (Vec::new(), Vec::new());
        for (chunk, w) in w.chunks(CHUNK * x.ncols()).enumerate() {
            let w = matrix(w, x.ncols());
            let mut logits = logits(x, w);
            self.tokens.cap.apply(&mut logits);
            parts.push(self.part(&logits, w.nrows(), first + chunk * CHUNK));
            if self.keep && (chunk + 1) * CHUNK * x.nrows() * TASKS <= KEPT {
                kept.push(logits);
            }
        }
        (parts, kept)
    }
}

/// What all tasks of the backward pass read.
struct Backward<'a> {
    op: &'a ByColumns,
    saved: &'a Saved,
    x: MatRef<'a, f32>,
    /// The gradient with respect to each loss, times the token's weight.
    scales: Vec<f32>,
    /// Rows of `W` in a task.
    rows: usize,
}

impl Backward<'_> {
    /// A task's part of the gradient with respect to `x`. `dw` takes the gradient with respect to the task's rows of `W`,
    /// if `W` is trained, a product with the factor `x`.
    fn run(&self, task: usize, w: &[f32], mut dw: Option<(&mut [f32], Accum, &Factor<'_>)>) -> Vec<f32> {
        let d = self.x.ncols();
        let mut dx = vec![0f32; self.x.nrows() * d];
        let kept = std::mem::take(&mut *lock(&self.saved.logits[task]));
        let mut kept = kept.into_iter();
        for (chunk, w) in w.chunks(CHUNK * d).enumerate() {
            let (w, first) = (matrix(w, d), task * self.rows + chunk * CHUNK);
            let mut gradient = kept.next().unwrap_or_else(|| {
                let mut logits = logits(self.x, w);
                self.op.tokens.cap.apply(&mut logits);
                logits
            });
            self.turn_into_gradient(&mut gradient, w.nrows(), first);
            let gradient = matrix(&gradient, w.nrows());
            Factor::new(w).multiply(&mut dx, Accum::Add, gradient);
            if let Some((dw, accum, x)) = &mut dw {
                let dw = &mut dw[chunk * CHUNK * d..][..w.nrows() * d];
                x.multiply(dw, *accum, gradient.transpose());
            }
        }
        dx
    }

    /// Turns logits of the `columns` columns from `first` on, capped, into the gradient before the cap.
    fn turn_into_gradient(&self, logits: &mut [f32], columns: usize, first: usize) {
        let slopes = self.op.tokens.cap.slopes(logits);
        for (n, row) in logits.chunks_exact_mut(columns).enumerate() {
            let (scale, log_sum) = (self.scales[n], self.saved.log_sums[n]);
            row.iter_mut().for_each(|x| *x = scale * exp(*x - log_sum));
            if let Some(at) = self.op.target(n, first, columns) {
                row[at] -= scale;
            }
        }
        through_cap(logits, slopes);
    }
}

impl CustomOp2 for ByColumns {
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
        let (x, w) = (matrix(slice(x, x_at)?, d), slice(w, w_at)?);
        let rows = rows_of_task(w.len() / d);
        let tasks = w.par_chunks(rows * d).enumerate();
        let (parts, kept): (Vec<_>, Vec<_>) =
            tasks.map(|(task, w)| self.forward_task(x, w, task * rows)).unzip();
        let parts: Vec<Part> = parts.into_iter().flatten().collect();
        let log_sums: Vec<f32> = (0..n)
            .map(|n| {
                let max = parts.iter().map(|part| part.max[n]).fold(f32::NEG_INFINITY, f32::max);
                max + parts.iter().map(|part| part.sum[n] * exp(part.max[n] - max)).sum::<f32>().ln()
            })
            .collect();
        let target = |n: usize| parts.iter().map(|part| part.target[n]).sum::<f32>();
        let losses = (0..n).map(|n| self.tokens.weights[n] * (log_sums[n] - target(n))).collect();
        // An operation runs forward once.
        let _ = self.saved.set(Saved { log_sums, logits: kept.into_iter().map(Mutex::new).collect() });
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
        let Some(saved) = self.saved.get() else {
            bail!("linear_cross_entropy: expected the forward pass to run first");
        };
        read([x, w, g], |[x_values, w_values, g]| {
            let scales = g.iter().zip(&self.tokens.weights).map(|(g, weight)| g * weight).collect();
            let rows = rows_of_task(v);
            let backward = Backward { op: self, saved, x: matrix(x_values, d), scales, rows };
            let tasks = w_values.par_chunks(rows * d).enumerate();
            let mut parts: Vec<Vec<f32>> = Vec::new();
            let dw = add_gradient(w, |dw, accum| {
                let x = Factor::new(backward.x);
                let tasks = tasks.clone().zip(dw.par_chunks_mut(rows * d));
                parts = tasks.map(|((task, w), dw)| backward.run(task, w, Some((dw, accum, &x)))).collect();
            })?;
            if !w.track_op() {
                parts = tasks.map(|(task, w)| backward.run(task, w, None)).collect();
            }
            let mut dx = vec![0f32; n * d];
            let block = rows_per_block(n) * d;
            dx.par_chunks_mut(block).enumerate().for_each(|(index, dx)| {
                let parts: Vec<&[f32]> =
                    parts.iter().map(|part| &part[index * block..][..dx.len()]).collect();
                add_parts(&parts, dx, Accum::Replace);
            });
            Ok((Some(Tensor::from_vec(dx, (n, d), x.device())?), dw))
        })
    }
}

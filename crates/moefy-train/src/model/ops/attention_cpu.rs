//! Attention on the CPU in f32, one task for each sequence and key/value head.
//!
//! Keys and values of a head are transposed first, `(d, T)`, so that inner loops run over keys and vectorise
//! however small `d` is. A query's scores live in one row of `T` numbers; the backward pass computes them again
//! from the log-sum-exp of each row. With `P = softmax`, `δ_i = g_i·o_i`:
//!
//! ```text
//! dS_ij = P_ij (g_i·v_j - δ_i) / √d     dq_i = Σ_j dS_ij k_j     dk_j = Σ_i dS_ij q_i     dv_j = Σ_i P_ij g_i
//! ```

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::AttentionShape;
use super::cpu::{LANES, axpy, dot, exp, max, mul_add, read, rows_per_task, slice, sum};

/// The operation of one forward and one backward pass.
pub(super) struct FusedAttention {
    shape: AttentionShape,
    /// `logsumexp` of every query's scores, `(H / K, T)` for each task.
    log_sums: OnceLock<Vec<Vec<f32>>>,
}

/// Ranges of key positions.
struct Visible {
    keys: Range<usize>,
    blocks: Range<usize>,
}

/// What a task reads of a sequence's key/value head.
struct Head {
    keys: Vec<f32>,   // (d, padded T)
    values: Vec<f32>, // (d, padded T)
}

/// Gradients of a task.
struct Gradients {
    q: Vec<f32>, // (H / K, T, d)
    k: Vec<f32>, // (T, d)
    v: Vec<f32>, // (T, d)
}

impl FusedAttention {
    pub(super) fn new(shape: AttentionShape) -> Self {
        Self { shape, log_sums: OnceLock::new() }
    }

    /// T rounded up to whole blocks of lanes.
    fn padded(&self) -> usize {
        self.shape.positions.next_multiple_of(LANES)
    }

    /// H / K: query heads of a task.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn tasks(&self) -> usize {
        self.shape.sequences * self.shape.kv_heads
    }

    fn scale(&self) -> f32 {
        (self.shape.head_dim as f32).sqrt().recip()
    }

    /// Keys that the query at `position` sees, and the whole blocks of lanes that hold them.
    fn visible(&self, position: usize) -> Visible {
        let end = position + 1;
        let start = end - self.shape.window.unwrap_or(end).min(end);
        let blocks = start / LANES * LANES..end.next_multiple_of(LANES);
        Visible { keys: start..end, blocks }
    }

    /// Where a query's `d` numbers lie in q `(B·T, H·d)`.
    fn query(&self, task: usize, head: usize, position: usize) -> Range<usize> {
        let AttentionShape { positions, heads, kv_heads, head_dim: d, .. } = self.shape;
        let row = task / kv_heads * positions + position;
        let column = (task % kv_heads) * self.group() + head;
        let start = (row * heads + column) * d;
        start..start + d
    }

    /// `(d, padded T)` of the task's head in `x (B·T, K·d)`, zeros behind T.
    fn transposed(&self, x: &[f32], task: usize) -> Vec<f32> {
        let AttentionShape { positions, kv_heads, head_dim: d, .. } = self.shape;
        let padded = self.padded();
        let first = task / kv_heads * positions * kv_heads + task % kv_heads;
        let mut to = vec![0f32; d * padded];
        for position in 0..positions {
            for (c, &value) in x[(first + position * kv_heads) * d..][..d].iter().enumerate() {
                to[c * padded + position] = value;
            }
        }
        to
    }

    fn head(&self, k: &[f32], v: &[f32], task: usize) -> Head {
        Head { keys: self.transposed(k, task), values: self.transposed(v, task) }
    }

    /// Back from `(d, padded T)` to `(T, d)`.
    fn untransposed(&self, x: &[f32]) -> Vec<f32> {
        let (d, padded) = (self.shape.head_dim, self.padded());
        (0..self.shape.positions * d).map(|at| x[at % d * padded + at / d]).collect()
    }

    /// `(B·T, columns·d)` from each task's `(columns / K, T, d)`.
    fn assemble<P: AsRef<[f32]> + Sync>(&self, parts: &[P]) -> Vec<f32> {
        let AttentionShape { sequences, positions, kv_heads, head_dim: d, .. } = self.shape;
        let per_task = parts.first().map_or(0, |part| part.as_ref().len() / (positions * d).max(1));
        let width = kv_heads * per_task * d;
        let mut to = vec![0f32; sequences * positions * width];
        let rows = rows_per_task(width);
        to.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(chunk, to)| {
            for (row, to) in to.chunks_exact_mut(width).enumerate() {
                let row = chunk * rows + row;
                let (sequence, position) = (row / positions, row % positions);
                for (column, to) in to.chunks_exact_mut(d).enumerate() {
                    let part = parts[sequence * kv_heads + column / per_task].as_ref();
                    to.copy_from_slice(&part[(column % per_task * positions + position) * d..][..d]);
                }
            }
        });
        to
    }

    /// Output `(H / K, T, d)` and log-sum-exp `(H / K, T)` of a task.
    fn forward_task(&self, q: &[f32], head: &Head, task: usize) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { positions, head_dim: d, .. } = self.shape;
        let padded = self.padded();
        let mut output = vec![0f32; self.group() * positions * d];
        let mut log_sums = vec![0f32; self.group() * positions];
        let mut p = vec![0f32; padded];
        for (at, (o, log_sum)) in output.chunks_exact_mut(d).zip(&mut log_sums).enumerate() {
            let visible = self.visible(at % positions);
            let q = &q[self.query(task, at / positions, at % positions)];
            products(q, self.scale(), &head.keys, &mut p, &visible.blocks);
            let max = max(&p[visible.keys.clone()]);
            exp_visible(&mut p, max, &visible);
            let p = &p[visible.blocks.clone()];
            let total = sum(p, |p| p);
            for (o, values) in o.iter_mut().zip(head.values.chunks_exact(padded)) {
                *o = dot(p, &values[visible.blocks.clone()]) / total;
            }
            *log_sum = max + total.ln();
        }
        (output, log_sums)
    }

    fn backward_task(&self, [q, o, g]: [&[f32]; 3], head: &Head, task: usize, log_sums: &[f32]) -> Gradients {
        let AttentionShape { positions, head_dim: d, .. } = self.shape;
        let padded = self.padded();
        let mut dq = vec![0f32; self.group() * positions * d];
        let (mut dk, mut dv) = (vec![0f32; d * padded], vec![0f32; d * padded]);
        let (mut p, mut ds) = (vec![0f32; padded], vec![0f32; padded]);
        for (at, dq) in dq.chunks_exact_mut(d).enumerate() {
            let visible = self.visible(at % positions);
            let blocks = visible.blocks.clone();
            let query = self.query(task, at / positions, at % positions);
            let (q, o, g) = (&q[query.clone()], &o[query.clone()], &g[query]);
            products(q, self.scale(), &head.keys, &mut p, &blocks);
            exp_visible(&mut p, log_sums[at], &visible);
            products(g, 1.0, &head.values, &mut ds, &blocks);
            let (p, ds) = (&p[blocks.clone()], &mut ds[blocks.clone()]);
            let delta = dot(g, o);
            ds.iter_mut().zip(p).for_each(|(ds, &p)| *ds = p * (*ds - delta) * self.scale());
            for c in 0..d {
                let column = c * padded + blocks.start..c * padded + blocks.end;
                dq[c] = dot(ds, &head.keys[column.clone()]);
                axpy(&mut dk[column.clone()], q[c], ds);
                axpy(&mut dv[column], g[c], p);
            }
        }
        Gradients { q: dq, k: self.untransposed(&dk), v: self.untransposed(&dv) }
    }
}

/// `y_j = scale Σ_c x_c a_cj` for the columns of `blocks`; `a (d, padded T)`, `y (padded T)`.
#[inline(always)]
fn products(x: &[f32], scale: f32, a: &[f32], y: &mut [f32], blocks: &Range<usize>) {
    let padded = y.len();
    for start in blocks.clone().step_by(LANES) {
        let mut lanes = [0f32; LANES];
        for (&x, a) in x.iter().zip(a.chunks_exact(padded)) {
            let a: &[f32; LANES] = a[start..].first_chunk().expect("rows are padded to whole blocks");
            for l in 0..LANES {
                lanes[l] = mul_add(x, a[l], lanes[l]);
            }
        }
        y[start..start + LANES].iter_mut().zip(lanes).for_each(|(y, lane)| *y = lane * scale);
    }
}

/// Scores to `e^(score - shift)`; 0 for hidden keys.
#[inline(always)]
fn exp_visible(row: &mut [f32], shift: f32, visible: &Visible) {
    row[visible.blocks.clone()].iter_mut().for_each(|s| *s = exp(*s - shift));
    row[visible.blocks.start..visible.keys.start].fill(0.0);
    row[visible.keys.end..visible.blocks.end].fill(0.0);
}

impl CustomOp3 for FusedAttention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_at: &Layout,
        k: &CpuStorage,
        k_at: &Layout,
        v: &CpuStorage,
        v_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (slice(q, q_at)?, slice(k, k_at)?, slice(v, v_at)?);
        let (outputs, log_sums): (Vec<_>, Vec<_>) = (0..self.tasks())
            .into_par_iter()
            .map(|task| self.forward_task(q, &self.head(k, v, task), task))
            .unzip();
        // An operation runs forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(self.assemble(&outputs)), q_at.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("attention: expected the forward pass to run first");
        };
        let parts: Vec<Gradients> = read([q, k, v, o, g], |[q, k, v, o, g]| {
            Ok((0..self.tasks())
                .into_par_iter()
                .map(|task| self.backward_task([q, o, g], &self.head(k, v, task), task, &log_sums[task]))
                .collect())
        })?;
        let gradient = |of: &Tensor, part: fn(&Gradients) -> &Vec<f32>| {
            let parts: Vec<&[f32]> = parts.iter().map(|gradients| part(gradients).as_slice()).collect();
            Tensor::from_vec(self.assemble(&parts), of.shape(), of.device()).map(Some)
        };
        Ok((gradient(q, |g| &g.q)?, gradient(k, |g| &g.k)?, gradient(v, |g| &g.v)?))
    }
}

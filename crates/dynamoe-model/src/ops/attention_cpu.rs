//! Attention on the CPU in f32, one task for each sequence and key/value head.
//!
//! [`LANES`] queries (or keys, for the gradients) are computed at once, one in each lane. So loops vectorise for any `d`,
//! and no sum runs across lanes. Scores are `T` rows of lanes, which fit the cache. The backward pass computes them again
//! from the log-sum-exp of each query. With `P = softmax` and `δ_i = g_i·o_i`:
//!
//! ```text
//! dS_ij = scale P_ij (g_i·v_j - δ_i)     dq_i = Σ_j dS_ij k_j     dk_j = Σ_i dS_ij q_i     dv_j = Σ_i P_ij g_i
//! ```
//!
//! Where scores are capped by `c`, `dS_ij` is also multiplied by the slope of `c tanh(s / c)`, `1 - tanh²(s / c)`.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_shape::AttentionShape;
use super::cpu::{dot, exp, larger, mul_add, rows_per_task, tanh};

/// Queries or keys that are computed at once: two registers of AVX-512, or of AVX2, which has half as many registers.
const LANES: usize = if cfg!(target_feature = "avx512f") { 32 } else { 16 };
/// Rows of scores, or columns of a head, whose sums are kept in registers at once.
const ROWS: usize = 4;
/// Numbers of a head that are computed at once; a multiple of [`ROWS`].
const COLUMNS: usize = 8;

/// One number for each lane.
type Lanes = [f32; LANES];

/// Attention of one shape over row-major slices. q, o and their gradients are `(B·T, H·d)`; k, v and their gradients are
/// `(B·T, K·d)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel(pub AttentionShape);

/// The results of the forward pass.
pub(super) struct Output {
    /// `(B·T, H·d)`
    pub o: Vec<f32>,
    /// `logsumexp` of every query's scores, `(H / K, T)` for each task.
    pub log_sums: Vec<Vec<f32>>,
}

/// What the backward pass reads: inputs and results of the forward pass.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub o: &'a [f32],
    pub log_sums: &'a [Vec<f32>],
}

/// Gradients with respect to q, k and v. Those of a task are `(H / K, T, d)`, `(T, d)` and `(T, d)`.
pub(super) struct AttentionGradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// Where the rows of one head stand in a row-major matrix: `start`, `start + stride`, …
struct Place {
    start: usize,
    stride: usize,
}

/// The rows of one head, `(T, d)`, with `d` padded by zeros to whole blocks of [`COLUMNS`].
struct Head {
    rows: Vec<f32>,
    width: usize,
}

/// A head as [`multiply`] reads it: `(T / ROWS, d, ROWS)`.
struct Panels {
    numbers: Vec<[f32; ROWS]>,
    width: usize,
}

impl Head {
    /// Copies a head out of `x`.
    fn new(x: &[f32], place: &Place, shape: &AttentionShape) -> Self {
        let d = shape.head_dim;
        let width = d.next_multiple_of(COLUMNS);
        let mut rows = vec![0f32; shape.positions * width];
        for (to, from) in rows.chunks_exact_mut(width).zip(x[place.start..].chunks(place.stride)) {
            copy(&from[..d], &mut to[..d]);
        }
        Self { rows, width }
    }

    fn scaled(mut self, factor: f32) -> Self {
        self.rows.iter_mut().for_each(|x| *x *= factor);
        self
    }

    fn panels(&self) -> Panels {
        let zeros = vec![0f32; self.width];
        let mut numbers = Vec::with_capacity((self.rows.len() / ROWS).next_multiple_of(self.width));
        for block in self.rows.chunks(ROWS * self.width) {
            let mut rows = block.chunks_exact(self.width);
            let [r0, r1, r2, r3] = std::array::from_fn(|_| rows.next().unwrap_or(&zeros));
            let columns = r0.iter().zip(r1).zip(r2.iter().zip(r3));
            numbers.extend(columns.map(|((&a, &b), (&c, &d))| [a, b, c, d]));
        }
        Panels { numbers, width: self.width }
    }

    /// The positions from `first` on, one in each lane: `(d)`. Lanes beyond T are zeros.
    fn lanes(&self, first: usize) -> Vec<Lanes> {
        let mut lanes = vec![[0f32; LANES]; self.width];
        for (l, row) in self.rows.chunks_exact(self.width).skip(first).take(LANES).enumerate() {
            lanes.iter_mut().zip(row).for_each(|(lanes, &x)| lanes[l] = x);
        }
        lanes
    }
}

/// Copies a head's few numbers, inlined: a call of memcpy would take longer.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<COLUMNS>(), to.as_chunks_mut::<COLUMNS>());
    from.iter().zip(to).for_each(|(from, to)| *to = *from);
    from_rest.iter().zip(to_rest).for_each(|(from, to)| *to = *from);
}

/// `sums_r + Σ a_r b` over pairs of `a` and `b`. The four sums are variables of their own, so that they stay in registers.
#[inline(always)]
fn add_products<'a, const N: usize>(
    sums: [[f32; N]; ROWS],
    pairs: impl Iterator<Item = ([f32; ROWS], &'a [f32; N])>,
) -> [[f32; N]; ROWS] {
    let [mut s0, mut s1, mut s2, mut s3] = sums;
    for ([a0, a1, a2, a3], b) in pairs {
        for l in 0..N {
            s0[l] = mul_add(a0, b[l], s0[l]);
            s1[l] = mul_add(a1, b[l], s1[l]);
            s2[l] = mul_add(a2, b[l], s2[l]);
            s3[l] = mul_add(a3, b[l], s3[l]);
        }
    }
    [s0, s1, s2, s3]
}

/// `out_r = Σ_c a_rc b_c` for the rows of `a` in `range`, whose ends are multiples of [`ROWS`] or T. `out` is resized and
/// starts at the first of these rows.
#[inline(always)]
fn multiply(a: &Panels, range: &Range<usize>, b: &[Lanes], out: &mut Vec<Lanes>) {
    out.resize(range.len().next_multiple_of(ROWS), [0f32; LANES]);
    let panels = &a.numbers[range.start / ROWS * a.width..range.end.div_ceil(ROWS) * a.width];
    for (panel, out) in panels.chunks_exact(a.width).zip(out.as_chunks_mut::<ROWS>().0) {
        let sums = add_products([[0f32; LANES]; ROWS], panel.iter().copied().zip(b));
        // one by one: copying the whole array would call memcpy
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
    }
}

/// `out_c += Σ_r a_rc b_r` for the rows of `a` in `range`.
#[inline(always)]
fn accumulate(a: &Head, range: &Range<usize>, b: &[Lanes], out: &mut [Lanes]) {
    let rows = &a.rows[range.start * a.width..range.end * a.width];
    for (block, out) in out.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let rows = rows.chunks_exact(a.width);
        let columns = rows.map(|row| *row[block * ROWS..].first_chunk().expect("rows are padded to blocks"));
        let sums = add_products(*out, columns.zip(b));
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
    }
}

/// `out_r += Σ_l a_rl b_l` for blocks of rows of lanes `a` and the rows of `b` from `first` on; `out` is as wide as
/// `b`.
#[inline(always)]
fn accumulate_rows(a: &[Lanes], b: &Head, first: usize, out: &mut [f32]) {
    let b = &b.rows[first * b.width..];
    let width = out.len() / a.len();
    for ([a0, a1, a2, a3], out) in a.as_chunks().0.iter().zip(out.chunks_exact_mut(ROWS * width)) {
        for start in (0..width).step_by(COLUMNS) {
            let at: [usize; ROWS] = std::array::from_fn(|r| r * width + start);
            let sums = at.map(|at| *out[at..].first_chunk::<COLUMNS>().expect("whole blocks of columns"));
            let lanes = a0.iter().zip(a1).zip(a2.iter().zip(a3)).map(|((&a, &b), (&c, &d))| [a, b, c, d]);
            let rows = b.chunks_exact(width).map(|row| row[start..].first_chunk().expect("as wide as out"));
            for (at, sums) in at.into_iter().zip(add_products(sums, lanes.zip(rows))) {
                out[at..at + COLUMNS].copy_from_slice(&sums);
            }
        }
    }
}

/// Adds lane `l` of `from (d)` to row `first + l` of `to (T, d)`.
fn scatter(from: &[Lanes], first: usize, to: &mut [f32], d: usize) {
    for (l, to) in to.chunks_exact_mut(d).skip(first).take(LANES).enumerate() {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from[l]);
    }
}

/// Puts `value` into all lanes outside `visible`.
#[inline(always)]
fn hide(row: &mut Lanes, visible: &Range<usize>, value: f32) {
    if visible.len() < LANES {
        row[..visible.start].fill(value);
        row[visible.end..].fill(value);
    }
}

impl Kernel {
    /// H / K: query heads in a task.
    fn group(&self) -> usize {
        self.0.heads / self.0.kv_heads
    }

    fn window(&self) -> usize {
        self.0.window.unwrap_or(usize::MAX)
    }

    /// Lanes whose query sees the key at `j`, `j ≤ i < j + window`. Lane 0 is the query at `first`.
    fn queries_seeing(&self, j: usize, first: usize) -> Range<usize> {
        let start = j.saturating_sub(first).min(LANES);
        let end = j.saturating_add(self.window()).saturating_sub(first).min(LANES);
        start..end.max(start)
    }

    /// Lanes whose key the query at `i` sees, `i - window < j ≤ i`. Lane 0 is the key at `first`.
    fn keys_seen(&self, i: usize, first: usize) -> Range<usize> {
        let start = (i + 1).saturating_sub(self.window()).saturating_sub(first).min(LANES);
        let end = (i + 1).saturating_sub(first).min(LANES);
        start..end.max(start)
    }

    /// A task's head of q, o or their gradients.
    fn query_head(&self, x: &[f32], task: usize, head: usize) -> Head {
        let AttentionShape { positions, heads, kv_heads, head_dim: d, .. } = self.0;
        let column = (task % kv_heads) * self.group() + head;
        let start = (task / kv_heads * positions * heads + column) * d;
        Head::new(x, &Place { start, stride: heads * d }, &self.0)
    }

    /// A task's head of k or v.
    fn key_head(&self, x: &[f32], task: usize) -> Head {
        let AttentionShape { positions, kv_heads, head_dim: d, .. } = self.0;
        let start = (task / kv_heads * positions * kv_heads + task % kv_heads) * d;
        Head::new(x, &Place { start, stride: kv_heads * d }, &self.0)
    }

    /// Keys that any of the queries from `first` on sees, in whole blocks.
    fn keys_of(&self, first: usize) -> Range<usize> {
        let start = (first + 1).saturating_sub(self.window());
        start / ROWS * ROWS..(first + LANES).min(self.0.positions)
    }

    /// Queries that see any of the keys from `first` on, in whole blocks.
    fn queries_of(&self, first: usize) -> Range<usize> {
        let end = (first + LANES - 1).saturating_add(self.window());
        first / ROWS * ROWS..end.checked_next_multiple_of(ROWS).unwrap_or(end).min(self.0.positions)
    }

    fn tasks(&self) -> usize {
        self.0.sequences * self.0.kv_heads
    }

    /// Joins the parts of all tasks, each `(columns / K, T, d)`, to `(B·T, columns·d)`.
    fn assemble<P: AsRef<[f32]> + Sync>(&self, parts: &[P]) -> Vec<f32> {
        let AttentionShape { sequences, positions, kv_heads, head_dim: d, .. } = self.0;
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
                    copy(&part[(column % per_task * positions + position) * d..][..d], to);
                }
            }
        });
        to
    }

    /// Attention of q, k and v.
    pub(super) fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Output {
        let tasks = (0..self.tasks()).into_par_iter();
        let (outputs, log_sums): (Vec<_>, Vec<_>) =
            tasks.map(|task| self.forward_task(q, k, v, task)).unzip();
        Output { o: self.assemble(&outputs), log_sums }
    }

    /// Gradients with respect to q, k and v; `g` is that with respect to o.
    pub(super) fn backward(&self, saved: Saved<'_>, g: &[f32]) -> AttentionGradients {
        let tasks = (0..self.tasks()).into_par_iter();
        let parts: Vec<AttentionGradients> = tasks.map(|task| self.backward_task(saved, g, task)).collect();
        let gradient = |part: fn(&AttentionGradients) -> &Vec<f32>| {
            self.assemble(&parts.iter().map(|gradients| part(gradients).as_slice()).collect::<Vec<_>>())
        };
        AttentionGradients { q: gradient(|g| &g.q), k: gradient(|g| &g.k), v: gradient(|g| &g.v) }
    }

    /// Output `(H / K, T, d)` and log-sum-exp `(H / K, T)` of a task.
    fn forward_task(&self, q: &[f32], k: &[f32], v: &[f32], task: usize) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { positions, head_dim: d, .. } = self.0;
        let (keys, values) = (self.key_head(k, task).panels(), self.key_head(v, task));
        let mut output = vec![0f32; self.group() * positions * d];
        let mut log_sums = vec![0f32; self.group() * positions];
        let mut scores = Vec::with_capacity(positions + ROWS);
        let heads = output.chunks_exact_mut(positions * d).zip(log_sums.chunks_exact_mut(positions));
        for (head, (output, log_sums)) in heads.enumerate() {
            let queries = self.query_head(q, task, head).scaled(self.0.scale);
            for first in (0..positions).step_by(LANES) {
                let range = self.keys_of(first);
                multiply(&keys, &range, &queries.lanes(first), &mut scores);
                if let Some(cap) = self.0.cap {
                    scores.as_flattened_mut().iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
                }
                let (max, sum) = self.softmax(&mut scores, &range, first);
                let mut o = vec![[0f32; LANES]; values.width];
                accumulate(&values, &range, &scores, &mut o);
                o.iter_mut().for_each(|o| (0..LANES).for_each(|l| o[l] /= sum[l]));
                scatter(&o, first, output, d);
                for (l, log_sum) in log_sums.iter_mut().skip(first).take(LANES).enumerate() {
                    *log_sum = max[l] + sum[l].ln();
                }
            }
        }
        (output, log_sums)
    }

    /// Turns scores of the queries from `first` on into `e^(score - max)`, 0 for hidden keys. Returns maximum and sum.
    fn softmax(&self, scores: &mut [Lanes], range: &Range<usize>, first: usize) -> (Lanes, Lanes) {
        let (mut max, mut sum) = ([f32::NEG_INFINITY; LANES], [0f32; LANES]);
        for (row, j) in scores.iter_mut().zip(range.clone()) {
            hide(row, &self.queries_seeing(j, first), f32::NEG_INFINITY);
            for l in 0..LANES {
                max[l] = larger(row[l], max[l]);
            }
        }
        for (row, j) in scores.iter_mut().zip(range.clone()) {
            for l in 0..LANES {
                row[l] = exp(row[l] - max[l]);
            }
            hide(row, &self.queries_seeing(j, first), 0.0);
        }
        for row in &scores[..range.len()] {
            for l in 0..LANES {
                sum[l] += row[l];
            }
        }
        (max, sum)
    }

    fn backward_task(&self, saved: Saved<'_>, g: &[f32], task: usize) -> AttentionGradients {
        let AttentionShape { positions, head_dim: d, .. } = self.0;
        let (keys, values) = (self.key_head(saved.k, task), self.key_head(saved.v, task));
        let mut dq = Vec::with_capacity(self.group() * positions * d);
        let (mut dk, mut dv) = (vec![0f32; positions * d], vec![0f32; positions * d]);
        for head in 0..self.group() {
            let queries = self.query_head(saved.q, task, head).scaled(self.0.scale);
            let [outputs, grads] = [saved.o, g].map(|x| self.query_head(x, task, head));
            let rows = outputs.rows.chunks_exact(outputs.width).zip(grads.rows.chunks_exact(grads.width));
            let deltas: Vec<f32> = rows.map(|(o, g)| dot(o, g)).collect();
            let head = BackwardHead {
                kernel: self,
                queries: &queries,
                keys: &keys,
                values: &values,
                grads: &grads,
                log_sums: &saved.log_sums[task][head * positions..][..positions],
                deltas: &deltas,
            };
            for row in head.run(&mut dk, &mut dv).chunks_exact(keys.width).take(positions) {
                dq.extend(row[..d].iter().map(|dq| self.0.scale * dq));
            }
        }
        AttentionGradients { q: dq, k: dk, v: dv }
    }
}

/// What the backward pass of one query head reads. Queries are scaled.
struct BackwardHead<'a> {
    kernel: &'a Kernel,
    queries: &'a Head,
    keys: &'a Head,
    values: &'a Head,
    grads: &'a Head,
    log_sums: &'a [f32],
    deltas: &'a [f32],
}

impl BackwardHead<'_> {
    /// Adds the gradients with respect to keys and values, a key in each lane. Returns that with respect to the scaled
    /// queries, with rows as wide as a [`Head`]'s.
    fn run(&self, dk: &mut [f32], dv: &mut [f32]) -> Vec<f32> {
        let AttentionShape { positions, head_dim: d, .. } = self.kernel.0;
        let (queries, grads) = (self.queries.panels(), self.grads.panels());
        let width = self.keys.width;
        let mut dq = vec![0f32; positions.next_multiple_of(ROWS) * width];
        let (mut p, mut ds) = (Vec::with_capacity(positions + ROWS), Vec::with_capacity(positions + ROWS));
        let mut sums = vec![[0f32; LANES]; width];
        for first in (0..positions).step_by(LANES) {
            let range = self.kernel.queries_of(first);
            multiply(&queries, &range, &self.keys.lanes(first), &mut p);
            multiply(&grads, &range, &self.values.lanes(first), &mut ds);
            for ((p, ds), i) in p.iter_mut().zip(&mut ds).zip(range.clone()) {
                let (log_sum, delta) = (self.log_sums[i], self.deltas[i]);
                ds.iter_mut().for_each(|ds| *ds -= delta);
                if let Some(cap) = self.kernel.0.cap {
                    for l in 0..LANES {
                        let t = tanh(p[l] / cap);
                        p[l] = cap * t;
                        ds[l] *= 1.0 - t * t;
                    }
                }
                for l in 0..LANES {
                    p[l] = exp(p[l] - log_sum);
                    ds[l] *= p[l];
                }
                let visible = self.kernel.keys_seen(i, first);
                hide(p, &visible, 0.0);
                hide(ds, &visible, 0.0);
            }
            sums.fill([0f32; LANES]);
            accumulate(self.grads, &range, &p, &mut sums);
            scatter(&sums, first, dv, d);
            sums.fill([0f32; LANES]);
            accumulate(self.queries, &range, &ds, &mut sums);
            scatter(&sums, first, dk, d);
            accumulate_rows(&ds, self.keys, first, &mut dq[range.start * width..][..ds.len() * width]);
        }
        dq
    }
}

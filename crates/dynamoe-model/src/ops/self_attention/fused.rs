//! [`SelfAttention`] for f32 on the CPU. Each block of rows goes through norm, projections and rotation while it is in the
//! cache. The backward pass does the same. Gradients with respect to weights go straight into
//! [`crate::ops::Gradients`].

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor, bail};
use faer::Accum;
use rayon::prelude::*;

use super::{Projection, SelfAttention};
use crate::ops::attention_cpu::{AttentionGradients, Kernel, Output, Saved};
use crate::ops::cpu::{Host, add_parts, axpy, blocks, host, matrix, read, rows_per_block, slice};
use crate::ops::gradients::{hand_over, hand_over_bias, hand_over_matrix};
use crate::ops::product::Factor;
use crate::ops::rms_norm::{norm_rows, norm_rows_backward};
use crate::ops::rope::{Direction, Rotation};
use crate::ops::{AttentionShape, Norm, Rotary};

/// The operation's name in errors.
const NAME: &str = "self_attention";

/// Inputs of the attention and what they were made from, row-major, a row for each token.
struct Projected {
    normed: Vec<f32>,
    /// Before the norms of heads; empty where the model has none.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// What the forward pass leaves for the backward pass.
struct Kept {
    projected: Projected,
    attention: Output,
}

/// The operation, for one forward and one backward pass.
pub(super) struct Fused {
    layer: SelfAttention,
    rotary: Option<Rotary>,
    shape: AttentionShape,
    keep: bool,
    kept: OnceLock<Kept>,
}

/// A projection's numbers.
struct Matrix<'a> {
    weight: Host<'a>,
    bias: Option<Host<'a>>,
    from: usize,
    to: usize,
}

/// A projection as a factor.
struct Forward<'a> {
    factor: Factor<'a>,
    bias: Option<&'a [f32]>,
    from: usize,
    to: usize,
}

impl Forward<'_> {
    /// `y = x Wᵀ + b` or `y += …`.
    fn run(&self, x: &[f32], y: &mut [f32], accum: Accum) {
        self.factor.multiply(y, accum, matrix(x, self.from));
        if let Some(bias) = self.bias {
            y.chunks_exact_mut(self.to).for_each(|y| axpy(y, 1.0, bias));
        }
    }
}

impl<'a> Matrix<'a> {
    fn new(projection: &'a Projection) -> Result<Self> {
        let (to, from) = projection.weight.dims2()?;
        let bias = projection.bias.as_ref().map(host).transpose()?;
        Ok(Self { weight: host(&projection.weight)?, bias, from, to })
    }

    fn forward(&self) -> Forward<'_> {
        Forward {
            factor: Factor::new(matrix(&self.weight, self.from).transpose()),
            bias: self.bias.as_deref(),
            from: self.from,
            to: self.to,
        }
    }

    /// The factor of `dx = g W`.
    fn backward(&self) -> Factor<'_> {
        Factor::new(matrix(&self.weight, self.from))
    }
}

/// What happens to the heads of q or k between projection and attention: norm and rotation.
struct RotateHeads<'a> {
    weights: Option<Host<'a>>,
    norm: Norm,
    /// Cosines and sines; none where heads are not turned.
    angles: Option<[Host<'a>; 2]>,
    /// `heads · d`
    width: usize,
    /// `d / 2`
    half: usize,
}

impl<'a> RotateHeads<'a> {
    fn new(op: &'a Fused, weights: Option<&'a Tensor>, heads: usize) -> Result<Self> {
        let angles =
            op.rotary.as_ref().map(|rotary| Ok::<_, Error>([host(&rotary.cos)?, host(&rotary.sin)?]));
        Ok(Self {
            weights: weights.map(host).transpose()?,
            norm: op.layer.norms,
            angles: angles.transpose()?,
            width: heads * op.shape.head_dim,
            half: op.shape.head_dim / 2,
        })
    }

    /// Turns the heads of rows in place, if they are to be turned. The first row is number `first` of all.
    fn turn(&self, x: &mut [f32], first: usize, direction: Direction) {
        if let Some([cos, sin]) = &self.angles {
            Rotation { cos, sin, half: self.half }.turn(x, self.width, first, direction);
        }
    }

    /// Norms and turns rows in place. The first row is number `first` of all. If the heads are normed, `raw` becomes a
    /// copy of `x` as it was before.
    fn forward(&self, x: &mut [f32], first: usize, raw: &mut [f32]) {
        if let Some(weights) = &self.weights {
            raw.copy_from_slice(x);
            norm_rows(raw, weights, self.norm, x);
        }
        self.turn(x, first, Direction::Forward);
    }

    /// Turns the gradient with respect to the result of [`RotateHeads::forward`] into that with respect to its input.
    /// Adds the gradient with respect to the norm's weights to `d_norm`.
    fn backward(&self, g: &mut [f32], first: usize, raw: &[f32], d_norm: &mut [f32]) {
        self.turn(g, first, Direction::Back);
        if let Some(weights) = &self.weights {
            norm_rows_backward(raw, weights, self.norm, g, d_norm);
        }
    }
}

/// Gradients with respect to the weights of the norms, from a block of rows.
struct NormGradients {
    input: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
}

/// All that the backward pass computes from rows.
struct RowGradients {
    /// With respect to the projections' results.
    projected: AttentionGradients,
    /// With respect to `x`.
    x: Vec<f32>,
    /// Of each block of rows.
    norms: Vec<NormGradients>,
}

impl Fused {
    /// `keep` says whether there may be a backward pass.
    pub(super) fn new(
        layer: SelfAttention,
        rotary: Option<Rotary>,
        shape: AttentionShape,
        keep: bool,
    ) -> Self {
        Self { layer, rotary, shape, keep, kept: OnceLock::new() }
    }

    /// Columns of `raw_q` and of `raw_k` in [`Projected`].
    fn raw_widths(&self) -> [usize; 2] {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = self.shape;
        let width = |norm: &Option<Tensor>, heads| if norm.is_some() { heads * d } else { 0 };
        [width(&self.layer.q_norm, heads), width(&self.layer.k_norm, kv_heads)]
    }

    fn rotate_q(&self) -> Result<RotateHeads<'_>> {
        RotateHeads::new(self, self.layer.q_norm.as_ref(), self.shape.heads)
    }

    fn rotate_k(&self) -> Result<RotateHeads<'_>> {
        RotateHeads::new(self, self.layer.k_norm.as_ref(), self.shape.kv_heads)
    }

    /// Norm, projections and rotation.
    fn project(&self, x: &[f32], d: usize) -> Result<Projected> {
        let layer = &self.layer;
        let n = x.len() / d;
        let [q, k, v] = [Matrix::new(&layer.q)?, Matrix::new(&layer.k)?, Matrix::new(&layer.v)?];
        let (rotate_q, rotate_k) = (self.rotate_q()?, self.rotate_k()?);
        let norm = host(&layer.norm)?;
        let [raw_q, raw_k] = self.raw_widths();
        let zeros = |columns: usize| vec![0f32; n * columns];
        let mut all = Projected {
            normed: zeros(d),
            raw_q: zeros(raw_q),
            raw_k: zeros(raw_k),
            q: zeros(q.to),
            k: zeros(k.to),
            v: zeros(v.to),
        };
        let out = [
            (&mut all.normed[..], d),
            (&mut all.raw_q, raw_q),
            (&mut all.raw_k, raw_k),
            (&mut all.q, q.to),
            (&mut all.k, k.to),
            (&mut all.v, v.to),
        ];
        let (q, k, v) = (q.forward(), k.forward(), v.forward());
        let rows = rows_per_block(n);
        blocks(out, rows, n).into_par_iter().zip(x.par_chunks(rows * d)).enumerate().for_each(
            |(block, ([normed, raw_q, raw_k, to_q, to_k, to_v], x))| {
                norm_rows(x, &norm, layer.norms, normed);
                q.run(normed, to_q, Accum::Replace);
                rotate_q.forward(to_q, block * rows, raw_q);
                k.run(normed, to_k, Accum::Replace);
                rotate_k.forward(to_k, block * rows, raw_k);
                v.run(normed, to_v, Accum::Replace);
            },
        );
        Ok(all)
    }

    /// `x + W_o o`, or `W_o o`.
    fn output(&self, x: &[f32], d: usize, o: &[f32]) -> Result<Vec<f32>> {
        let matrix = Matrix::new(&self.layer.o)?;
        let rows = rows_per_block(x.len() / d);
        let (mut y, accum) = match self.layer.residual {
            true => (x.to_vec(), Accum::Add),
            false => (vec![0f32; x.len()], Accum::Replace),
        };
        let forward = matrix.forward();
        y.par_chunks_mut(rows * d)
            .zip(o.par_chunks(rows * matrix.from))
            .for_each(|(y, o)| forward.run(o, y, accum));
        Ok(y)
    }

    fn backward(&self, x: &[f32], g: &[f32], kept: &Kept) -> Result<RowGradients> {
        let layer = &self.layer;
        let norm = host(&layer.norm)?;
        let (d, head_dim) = (norm.len(), self.shape.head_dim);
        let n = x.len() / d;
        let rows = rows_per_block(n);
        let [q, k, v, o] = [&layer.q, &layer.k, &layer.v, &layer.o].map(Matrix::new);
        let (q, k, v, o) = (q?, k?, v?, o?);
        let mut d_o = vec![0f32; n * o.from];
        let w_o = o.backward();
        d_o.par_chunks_mut(rows * o.from)
            .zip(g.par_chunks(rows * d))
            .for_each(|(d_o, g)| w_o.multiply(d_o, Accum::Replace, matrix(g, d)));
        let Kept { projected, attention } = kept;
        let saved = Saved {
            q: &projected.q,
            k: &projected.k,
            v: &projected.v,
            o: &attention.o,
            log_sums: &attention.log_sums,
        };
        let mut gradients = Kernel(self.shape).backward(saved, &d_o);

        let (rotate_q, rotate_k) = (self.rotate_q()?, self.rotate_k()?);
        let mut dx = vec![0f32; n * d];
        let out =
            [(&mut dx[..], d), (&mut gradients.q, q.to), (&mut gradients.k, k.to), (&mut gradients.v, v.to)];
        let [raw_q, raw_k] = self.raw_widths();
        let (w_q, w_k, w_v) = (q.backward(), k.backward(), v.backward());
        let norms = blocks(out, rows, n).into_par_iter().enumerate().map(|(block, [dx, dq, dk, dv])| {
            let first = block * rows;
            let last = n.min(first + rows);
            let raw_q = &projected.raw_q[first * raw_q..last * raw_q];
            let raw_k = &projected.raw_k[first * raw_k..last * raw_k];
            let (x, g) = (&x[first * d..last * d], &g[first * d..last * d]);
            let mut norms =
                NormGradients { input: vec![0f32; d], q: vec![0f32; head_dim], k: vec![0f32; head_dim] };
            rotate_q.backward(dq, first, raw_q, &mut norms.q);
            rotate_k.backward(dk, first, raw_k, &mut norms.k);
            w_q.multiply(dx, Accum::Replace, matrix(dq, q.to));
            w_k.multiply(dx, Accum::Add, matrix(dk, k.to));
            w_v.multiply(dx, Accum::Add, matrix(dv, v.to));
            norm_rows_backward(x, &norm, layer.norms, dx, &mut norms.input);
            if layer.residual {
                axpy(dx, 1.0, g);
            }
            norms
        });
        let norms = norms.collect();
        Ok(RowGradients { projected: gradients, x: dx, norms })
    }

    /// Hands over the gradients with respect to the weights.
    fn hand_over_weights(&self, g: &[f32], kept: &Kept, gradients: &RowGradients) -> Result<()> {
        let layer = &self.layer;
        let (normed, rows) = (&kept.projected.normed, &gradients.projected);
        for (projection, g, x) in [
            (&layer.q, &rows.q[..], normed),
            (&layer.k, &rows.k, normed),
            (&layer.v, &rows.v, normed),
            (&layer.o, g, &kept.attention.o),
        ] {
            hand_over_matrix(NAME, &projection.weight, g, x)?;
            if let Some(bias) = &projection.bias {
                hand_over_bias(NAME, bias, g)?;
            }
        }
        let parts =
            |part: fn(&NormGradients) -> &Vec<f32>| gradients.norms.iter().map(part).collect::<Vec<_>>();
        for (weight, parts) in [
            (Some(&layer.norm), parts(|norms| &norms.input)),
            (layer.q_norm.as_ref(), parts(|norms| &norms.q)),
            (layer.k_norm.as_ref(), parts(|norms| &norms.k)),
        ] {
            if let Some(weight) = weight {
                hand_over(NAME, weight, |dw, accum| add_parts(&parts, dw, accum))?;
            }
        }
        Ok(())
    }
}

impl CustomOp2 for Fused {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        _trained: &CpuStorage,
        _trained_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, d) = (slice(x, x_at)?, x_at.shape().dims2()?.1);
        let projected = self.project(x, d)?;
        let attention = Kernel(self.shape).forward(&projected.q, &projected.k, &projected.v);
        let y = self.output(x, d, &attention.o)?;
        if self.keep {
            // An operation runs forward once.
            let _ = self.kept.set(Kept { projected, attention });
        }
        Ok((CpuStorage::F32(y), x_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _trained: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(kept) = self.kept.get() else {
            bail!("self_attention: expected the forward pass to run first");
        };
        let dx = read([x, g], |[x, g]| {
            let gradients = self.backward(x, g, kept)?;
            self.hand_over_weights(g, kept, &gradients)?;
            Ok(gradients.x)
        })?;
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), None))
    }
}

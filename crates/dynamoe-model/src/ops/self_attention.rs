//! The attention sublayer in one: `y = x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)` with
//! `n = rms_norm(x)`, biases and norms of heads where the model has them.
//!
//! On the CPU in f32 each block of rows goes through norm, projections and rotation while it is in the cache, and
//! likewise backwards. Gradients of weights go straight into [`super::Gradients`].

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use faer::Accum;
use rayon::prelude::*;

use super::attention_cpu::{Gradients, Kernel, Output};
use super::cpu::{
    Host, add_parts, axpy, blocks, fusable, host, matrix, multiply, multiply_blocks, read, rows_per_block,
    slice,
};
use super::gradients::add_gradient;
use super::rms_norm::{norm_rows, norm_rows_backward};
use super::rope::turn_rows;
use super::rotary::Rotary;
use super::{AttentionShape, attention, linear, rms_norm, rope};

/// A projection with an optional bias.
#[derive(Debug, Clone)]
pub struct Projection {
    /// `(out, in)`
    pub weight: Tensor,
    /// `(out)`
    pub bias: Option<Tensor>,
}

impl Projection {
    /// `x (N, in)` → `(N, out)`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// The weights of an attention sublayer.
#[derive(Debug, Clone)]
pub struct SelfAttention {
    /// `(D)`
    pub norm: Tensor,
    /// `(H·d, D)`
    pub q: Projection,
    /// `(K·d, D)`
    pub k: Projection,
    /// `(K·d, D)`
    pub v: Projection,
    /// `(D, H·d)`
    pub o: Projection,
    /// Norm of each query head, `(d)`.
    pub q_norm: Option<Tensor>,
    /// Norm of each key head, `(d)`.
    pub k_norm: Option<Tensor>,
    /// What norms add to the mean square.
    pub eps: f64,
}

impl SelfAttention {
    /// `x (B·T, D)` → `(B·T, D)`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: &Tensor, rotary: &Rotary, shape: AttentionShape) -> Result<Tensor> {
        let mut tensors = self.weights();
        let trained = tensors.iter().copied().find(|weight| weight.track_op()).unwrap_or(&self.norm);
        tensors.extend([&rotary.cos, &rotary.sin]);
        if fusable(&tensors) && tensors.iter().all(|tensor| tensor.is_contiguous()) && fusable(&[x]) {
            self.check(x, rotary, shape)?;
            let keep = x.track_op() || trained.track_op();
            let op =
                Fused { layer: self.clone(), rotary: rotary.clone(), shape, keep, saved: OnceLock::new() };
            // The trained weight as an input makes candle run the backward pass.
            return x.contiguous()?.apply_op2(trained, op);
        }
        self.forward_composed(x, rotary, shape)
    }

    /// What the smaller operations would find each for itself.
    fn check(&self, x: &Tensor, rotary: &Rotary, shape: AttentionShape) -> Result<()> {
        let AttentionShape { sequences, positions, heads, kv_heads, head_dim, .. } = shape;
        shape.check()?;
        let (n, d) = x.dims2()?;
        let (q, k) = (heads * head_dim, kv_heads * head_dim);
        let projections = [&self.q, &self.k, &self.v, &self.o];
        let weights = projections.map(|projection| projection.weight.dims());
        let fit = |x: &Option<Tensor>, len: usize| x.as_ref().is_none_or(|x| x.dims() == [len]);
        if n != sequences * positions
            || !projections.iter().zip([q, k, k, d]).all(|(projection, out)| fit(&projection.bias, out))
            || !(fit(&self.q_norm, head_dim) && fit(&self.k_norm, head_dim))
            || weights != [&[q, d], &[k, d], &[k, d], &[d, q]]
            || self.norm.dims() != [d]
            || rotary.cos.dims() != [positions, head_dim / 2]
        {
            bail!(
                "self_attention: expected x (B·T, D), weights, biases and norms that fit {shape:?}, found x {:?}, \
                 weights {weights:?}, rotary tables {:?}",
                x.dims(),
                rotary.cos.dims()
            );
        }
        Ok(())
    }

    /// [`SelfAttention::forward`] out of smaller operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_composed(&self, x: &Tensor, rotary: &Rotary, shape: AttentionShape) -> Result<Tensor> {
        let normed = rms_norm(x, &self.norm, self.eps)?;
        let q = head_norm(self.q.forward(&normed)?, self.q_norm.as_ref(), self.eps)?; // (N, H·d)
        let k = head_norm(self.k.forward(&normed)?, self.k_norm.as_ref(), self.eps)?; // (N, K·d)
        let v = self.v.forward(&normed)?; // (N, K·d)
        x + self.o.forward(&attention(&rope(&q, rotary)?, &rope(&k, rotary)?, &v, shape)?)?
    }

    fn weights(&self) -> Vec<&Tensor> {
        let projections = [&self.q, &self.k, &self.v, &self.o];
        let mut weights: Vec<&Tensor> = projections.iter().map(|projection| &projection.weight).collect();
        weights.extend(projections.iter().filter_map(|projection| projection.bias.as_ref()));
        weights.extend([&self.q_norm, &self.k_norm].into_iter().flatten());
        weights.push(&self.norm);
        weights
    }
}

/// Norms each head of `x (N, heads·d)` by `w (d)`, where there is one.
fn head_norm(x: Tensor, w: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let Some(w) = w else { return Ok(x) };
    rms_norm(&x.reshape(((), w.dim(0)?))?, w, eps)?.reshape(x.shape())
}

/// What the backward pass needs of the forward pass; all row-major, a row for each token.
struct Saved {
    normed: Vec<f32>,
    /// Before the norms of heads, where the model has them: else nothing.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attention: Output,
}

/// One forward and one backward pass.
struct Fused {
    layer: SelfAttention,
    rotary: Rotary,
    shape: AttentionShape,
    /// Whether there may be a backward pass.
    keep: bool,
    saved: OnceLock<Saved>,
}

/// A projection's numbers.
struct Matrix<'a> {
    weight: Host<'a>,
    bias: Option<Host<'a>>,
    from: usize,
    to: usize,
}

impl<'a> Matrix<'a> {
    fn new(projection: &'a Projection) -> Result<Self> {
        let (to, from) = projection.weight.dims2()?;
        let bias = projection.bias.as_ref().map(host).transpose()?;
        Ok(Self { weight: host(&projection.weight)?, bias, from, to })
    }

    /// `y = x Wᵀ + b` or `y += …`.
    fn forward(&self, x: &[f32], y: &mut [f32], accum: Accum) {
        multiply(y, accum, matrix(x, self.from), matrix(&self.weight, self.from).transpose());
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(self.to).for_each(|y| axpy(y, 1.0, bias));
        }
    }

    /// `dx = g W` or `dx += …`.
    fn backward(&self, g: &[f32], dx: &mut [f32], accum: Accum) {
        multiply(dx, accum, matrix(g, self.to), matrix(&self.weight, self.from));
    }
}

/// What happens to q or k between projection and attention.
struct Turn<'a> {
    norm: Option<Host<'a>>,
    cos: Host<'a>,
    sin: Host<'a>,
    eps: f32,
    /// Columns.
    width: usize,
    /// `d / 2`
    half: usize,
}

impl<'a> Turn<'a> {
    fn new(op: &'a Fused, norm: Option<&'a Tensor>, heads: usize) -> Result<Self> {
        Ok(Self {
            norm: norm.map(host).transpose()?,
            cos: host(&op.rotary.cos)?,
            sin: host(&op.rotary.sin)?,
            eps: op.layer.eps as f32,
            width: heads * op.shape.head_dim,
            half: op.shape.head_dim / 2,
        })
    }

    /// Norms and turns rows, of which the first is number `first`. `raw` takes them as they were, if they are
    /// normed.
    fn forward(&self, x: &mut [f32], first: usize, raw: &mut [f32]) {
        if let Some(norm) = &self.norm {
            raw.copy_from_slice(x);
            norm_rows(raw, norm, self.eps, x);
        }
        turn_rows(x, self.width, first, (&self.cos, &self.sin), (self.half, 1.0));
    }

    /// Turns the gradient by what [`Turn::forward`] made into that by what it was given; adds the norm's to
    /// `d_norm`.
    fn backward(&self, g: &mut [f32], first: usize, raw: &[f32], d_norm: &mut [f32]) {
        turn_rows(g, self.width, first, (&self.cos, &self.sin), (self.half, -1.0));
        if let Some(norm) = &self.norm {
            norm_rows_backward(raw, norm, self.eps, g, d_norm);
        }
    }
}

/// Gradients by the norms of a block of rows.
struct NormGradients {
    input: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
}

impl Fused {
    /// Columns of q and of k before the norm of heads that are kept.
    fn raw_widths(&self) -> [usize; 2] {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = self.shape;
        let width = |norm: &Option<Tensor>, heads| if norm.is_some() { heads * d } else { 0 };
        [width(&self.layer.q_norm, heads), width(&self.layer.k_norm, kv_heads)]
    }

    /// Norm, projections, rotation and attention.
    fn attend(&self, x: &[f32], d: usize) -> Result<Saved> {
        let layer = &self.layer;
        let n = x.len() / d;
        let [q, k, v] = [Matrix::new(&layer.q)?, Matrix::new(&layer.k)?, Matrix::new(&layer.v)?];
        let AttentionShape { heads, kv_heads, .. } = self.shape;
        let turn_q = Turn::new(self, layer.q_norm.as_ref(), heads)?;
        let turn_k = Turn::new(self, layer.k_norm.as_ref(), kv_heads)?;
        let norm = host(&layer.norm)?;
        let [raw_q, raw_k] = self.raw_widths();
        let columns = [d, raw_q, raw_k, q.to, k.to, v.to];
        let mut buffers = columns.map(|columns| vec![0f32; n * columns]);
        let rows = rows_per_block(n);
        let mut slices = buffers.iter_mut().zip(columns).map(|(buffer, columns)| (&mut buffer[..], columns));
        let slices = std::array::from_fn(|_| slices.next().expect("as many as columns"));
        blocks::<6>(slices, rows, n).into_par_iter().zip(x.par_chunks(rows * d)).enumerate().for_each(
            |(block, ([normed, raw_q, raw_k, to_q, to_k, to_v], x))| {
                norm_rows(x, &norm, layer.eps as f32, normed);
                q.forward(normed, to_q, Accum::Replace);
                turn_q.forward(to_q, block * rows, raw_q);
                k.forward(normed, to_k, Accum::Replace);
                turn_k.forward(to_k, block * rows, raw_k);
                v.forward(normed, to_v, Accum::Replace);
            },
        );
        let [normed, raw_q, raw_k, q, k, v] = buffers;
        let attention = Kernel(self.shape).forward(&q, &k, &v);
        Ok(Saved { normed, raw_q, raw_k, q, k, v, attention })
    }

    /// `x + W_o o`.
    fn output(&self, x: &[f32], d: usize, o: &[f32]) -> Result<Vec<f32>> {
        let matrix = Matrix::new(&self.layer.o)?;
        let rows = rows_per_block(x.len() / d);
        let mut y = x.to_vec();
        y.par_chunks_mut(rows * d)
            .zip(o.par_chunks(rows * matrix.from))
            .for_each(|(y, o)| matrix.forward(o, y, Accum::Add));
        Ok(y)
    }

    /// Gradients by q, k and v before rotation and norms, by `x`, and by the norms.
    fn backward(
        &self,
        x: &[f32],
        g: &[f32],
        saved: &Saved,
    ) -> Result<(Gradients, Vec<f32>, Vec<NormGradients>)> {
        let layer = &self.layer;
        let norm = host(&layer.norm)?;
        let (d, AttentionShape { heads, kv_heads, head_dim, .. }) = (norm.len(), self.shape);
        let n = x.len() / d;
        let rows = rows_per_block(n);
        let [q, k, v, o] = [&layer.q, &layer.k, &layer.v, &layer.o].map(Matrix::new);
        let (q, k, v, o) = (q?, k?, v?, o?);
        let mut by_o = vec![0f32; n * o.from];
        by_o.par_chunks_mut(rows * o.from)
            .zip(g.par_chunks(rows * d))
            .for_each(|(by_o, g)| o.backward(g, by_o, Accum::Replace));
        let attention = &saved.attention;
        let inputs = [&saved.q[..], &saved.k, &saved.v, &attention.o, &by_o];
        let mut by = Kernel(self.shape).backward(inputs, &attention.log_sums);

        let turn_q = Turn::new(self, layer.q_norm.as_ref(), heads)?;
        let turn_k = Turn::new(self, layer.k_norm.as_ref(), kv_heads)?;
        let mut dx = vec![0f32; n * d];
        let out = [(&mut dx[..], d), (&mut by.q, q.to), (&mut by.k, k.to), (&mut by.v, v.to)];
        let [raw_q, raw_k] = self.raw_widths();
        let norms = blocks(out, rows, n)
            .into_par_iter()
            .enumerate()
            .map(|(block, [dx, dq, dk, dv])| {
                let first = block * rows;
                let of = |x: &'_ [f32], columns: usize| -> Range<usize> {
                    first * columns..((first + rows) * columns).min(x.len())
                };
                let mut gradients =
                    NormGradients { input: vec![0f32; d], q: vec![0f32; head_dim], k: vec![0f32; head_dim] };
                turn_q.backward(dq, first, &saved.raw_q[of(&saved.raw_q, raw_q)], &mut gradients.q);
                turn_k.backward(dk, first, &saved.raw_k[of(&saved.raw_k, raw_k)], &mut gradients.k);
                q.backward(dq, dx, Accum::Replace);
                k.backward(dk, dx, Accum::Add);
                v.backward(dv, dx, Accum::Add);
                let rows = of(x, d);
                norm_rows_backward(&x[rows.clone()], &norm, layer.eps as f32, dx, &mut gradients.input);
                axpy(dx, 1.0, &g[rows]);
                gradients
            })
            .collect();
        Ok((by, dx, norms))
    }

    /// Adds the gradients of the weights to those of the backward pass at hand.
    fn by_weights(&self, g: &[f32], saved: &Saved, by: &Gradients, norms: &[NormGradients]) -> Result<()> {
        let layer = &self.layer;
        let mut lost = false;
        let mut add = |weight: &Tensor, write: &dyn Fn(&mut [f32], Accum)| -> Result<()> {
            lost |= add_gradient(weight, write)?.is_some();
            Ok(())
        };
        for (projection, g, x) in [
            (&layer.q, &by.q[..], &saved.normed),
            (&layer.k, &by.k, &saved.normed),
            (&layer.v, &by.v, &saved.normed),
            (&layer.o, g, &saved.attention.o),
        ] {
            let (to, from) = projection.weight.dims2()?;
            add(&projection.weight, &|dw, accum| {
                multiply_blocks(dw, accum, matrix(g, to).transpose(), matrix(x, from));
            })?;
            if let Some(bias) = &projection.bias {
                let rows: Vec<&[f32]> = g.chunks_exact(to).collect();
                add(bias, &|db, accum| add_parts(&rows, db, accum))?;
            }
        }
        let of = |part: fn(&NormGradients) -> &Vec<f32>| norms.iter().map(part).collect::<Vec<_>>();
        let norms = [
            (Some(&layer.norm), of(|norms| &norms.input)),
            (layer.q_norm.as_ref(), of(|norms| &norms.q)),
            (layer.k_norm.as_ref(), of(|norms| &norms.k)),
        ];
        for (weight, parts) in norms.iter().filter_map(|(weight, parts)| Some(((*weight)?, parts))) {
            add(weight, &|dw, accum| add_parts(parts, dw, accum))?;
        }
        if lost {
            bail!("self_attention: expected the backward pass to be run by Gradients::add");
        }
        Ok(())
    }
}

impl CustomOp2 for Fused {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        _trained: &CpuStorage,
        _trained_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, d) = (slice(x, x_at)?, x_at.shape().dims2()?.1);
        let saved = self.attend(x, d)?;
        let y = self.output(x, d, &saved.attention.o)?;
        if self.keep {
            // An operation runs forward once.
            let _ = self.saved.set(saved);
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
        let Some(saved) = self.saved.get() else {
            bail!("self_attention: expected the forward pass to run first");
        };
        let dx = read([x, g], |[x, g]| {
            let (by, dx, norms) = self.backward(x, g, saved)?;
            self.by_weights(g, saved, &by, &norms)?;
            Ok(dx)
        })?;
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), None))
    }
}

//! The attention sublayer as one operation: `y = x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)` with
//! `n = rms_norm(x)`, and with biases and norms of heads where the model has them. Some models norm or scale what attention
//! puts out, others leave out `rope`: then the operation ends before `x` is added, or turns nothing.
//!
//! [`fused`] is the implementation for f32 on the CPU.

mod fused;

use candle_core::{Result, Tensor, bail};

use super::cpu::fusable;
use super::rotary::Rotary;
use super::{AttentionShape, Norm, attention, linear, rms_norm, rope};
use fused::Fused;

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
    /// What every norm has besides weights.
    pub norms: Norm,
    /// Whether `x` is added to what attention puts out.
    pub residual: bool,
}

impl SelfAttention {
    /// `x (B·T, D)` → `(B·T, D)`. `rotary` is none for a layer that does not turn q and k.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: &Tensor, rotary: Option<&Rotary>, shape: AttentionShape) -> Result<Tensor> {
        let mut tensors = self.weights();
        let trained = tensors.iter().copied().find(|weight| weight.track_op()).unwrap_or(&self.norm);
        tensors.extend(rotary.into_iter().flat_map(|rotary| [&rotary.cos, &rotary.sin]));
        if fusable(&tensors) && tensors.iter().all(|tensor| tensor.is_contiguous()) && fusable(&[x]) {
            self.check(x, rotary, shape)?;
            let keep = x.track_op() || trained.track_op();
            let op = Fused::new(self.clone(), rotary.cloned(), shape, keep);
            // candle runs a backward pass only if an input is trained: so a trained weight is one
            return x.contiguous()?.apply_op2(trained, op);
        }
        self.forward_composed(x, rotary, shape)
    }

    /// Checks what each of the smaller operations would check.
    fn check(&self, x: &Tensor, rotary: Option<&Rotary>, shape: AttentionShape) -> Result<()> {
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
            || rotary.is_some_and(|rotary| rotary.cos.dims() != [positions, head_dim / 2])
        {
            bail!(
                "self_attention: expected x (B·T, D), weights, biases and norms that fit {shape:?}, found x {:?}, \
                 weights {weights:?}, rotary tables {:?}",
                x.dims(),
                rotary.map(|rotary| rotary.cos.dims())
            );
        }
        Ok(())
    }

    /// [`SelfAttention::forward`], composed of smaller operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_composed(
        &self,
        x: &Tensor,
        rotary: Option<&Rotary>,
        shape: AttentionShape,
    ) -> Result<Tensor> {
        let [q, k, v] = self.project(x, rotary)?;
        self.output(x, &attention(&q, &k, &v, shape)?)
    }

    /// What attention reads of `x (N, D)`: queries `(N, H·d)` and keys `(N, K·d)`, normed and turned, and values `(N, K·d)`.
    pub(crate) fn project(&self, x: &Tensor, rotary: Option<&Rotary>) -> Result<[Tensor; 3]> {
        let normed = rms_norm(x, &self.norm, self.norms)?;
        let mut q = head_norm(self.q.forward(&normed)?, self.q_norm.as_ref(), self.norms)?;
        let mut k = head_norm(self.k.forward(&normed)?, self.k_norm.as_ref(), self.norms)?;
        if let Some(rotary) = rotary {
            (q, k) = (rope(&q, rotary)?, rope(&k, rotary)?);
        }
        Ok([q, k, self.v.forward(&normed)?])
    }

    /// What the sublayer puts out for `x (N, D)` and attention's result `o (N, H·d)`: `(N, D)`.
    pub(crate) fn output(&self, x: &Tensor, o: &Tensor) -> Result<Tensor> {
        let y = self.o.forward(o)?;
        if self.residual { x + y } else { Ok(y) }
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

/// Norms each head of `x (N, heads·d)` with the weights `w (d)`, if there are any.
fn head_norm(x: Tensor, w: Option<&Tensor>, norm: Norm) -> Result<Tensor> {
    let Some(w) = w else { return Ok(x) };
    rms_norm(&x.reshape(((), w.dim(0)?))?, w, norm)?.reshape(x.shape())
}

//! Causal attention with grouped queries and an optional window.
//!
//! For a query at position `i`: `o_i = Σ_j p_ij v_j` with `p_ij = softmax_j(s_ij)` over the keys `i - window < j ≤ i`.
//! Scores are `s_ij = scale q_i·k_j`, or `c tanh(scale q_i·k_j / c)` where they are capped.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};

use super::attention_cpu::{Kernel, Saved};
use super::attention_shape::AttentionShape;
use super::cpu::{fusable, read, slice};
use super::softcap::softcap;

/// `q (B·T, H·d)`, `k` and `v (B·T, K·d)` → `(B·T, H·d)`.
///
/// # Errors
/// Tensors that do not have the shape.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    shape.check_tensors(q, k, v)?;
    if fusable(&[q, k, v]) {
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention::new(shape));
    }
    attention_composed(q, k, v, shape)
}

/// [`attention`], composed of candle's operations. The backward pass keeps tensors `(B, H, T, T)`.
///
/// # Errors
/// As [`attention`].
pub fn attention_composed(q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    let AttentionShape { sequences, positions, heads, kv_heads, head_dim, scale, cap, .. } = shape;
    let grouped = |x: &Tensor| {
        x.reshape((sequences, positions, kv_heads, 1, head_dim))?
            .broadcast_as((sequences, positions, kv_heads, heads / kv_heads, head_dim))?
            .reshape((sequences, positions, heads, head_dim))?
            .transpose(1, 2)?
            .contiguous() // (B, H, T, d)
    };
    let q = q.reshape((sequences, positions, heads, head_dim))?.transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&grouped(k)?.t()?)? * f64::from(scale))?; // (B, H, T, T)
    let scores = softcap(scores, cap)?;
    let mask = Tensor::from_vec(mask(shape), (positions, positions), q.device())?.to_dtype(q.dtype())?;
    let scores = scores.broadcast_add(&mask)?.to_dtype(DType::F32)?;
    let probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())?;
    probabilities.matmul(&grouped(v)?)?.transpose(1, 2)?.reshape((sequences * positions, heads * head_dim))
}

/// 0 where a query (row) sees a key (column), -∞ elsewhere: `(T, T)`.
fn mask(shape: AttentionShape) -> Vec<f32> {
    let window = shape.window.unwrap_or(usize::MAX);
    let visible = |i: usize, j: usize| j <= i && i - j < window;
    let t = shape.positions;
    (0..t * t).map(|at| if visible(at / t, at % t) { 0.0 } else { f32::NEG_INFINITY }).collect()
}

/// The operation, for one forward and one backward pass.
struct Attention {
    kernel: Kernel,
    /// The forward pass leaves them for the backward pass.
    log_sums: OnceLock<Vec<Vec<f32>>>,
}

impl Attention {
    fn new(shape: AttentionShape) -> Self {
        Self { kernel: Kernel(shape), log_sums: OnceLock::new() }
    }
}

impl CustomOp3 for Attention {
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
        let output = self.kernel.forward(slice(q, q_at)?, slice(k, k_at)?, slice(v, v_at)?);
        // An operation runs forward once.
        let _ = self.log_sums.set(output.log_sums);
        Ok((CpuStorage::F32(output.o), q_at.shape().clone()))
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
        let gradients = read([q, k, v, o, g], |[q, k, v, o, g]| {
            Ok(self.kernel.backward(Saved { q, k, v, o, log_sums }, g))
        })?;
        let tensor = |of: &Tensor, values| Tensor::from_vec(values, of.shape(), of.device()).map(Some);
        Ok((tensor(q, gradients.q)?, tensor(k, gradients.k)?, tensor(v, gradients.v)?))
    }
}

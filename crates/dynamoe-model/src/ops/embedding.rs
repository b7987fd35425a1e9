//! Rows of the embedding table: `x_n = table[tokens_n]`. A row's gradient is the sum over the tokens that take it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use faer::Accum;

use super::cpu::{axpy, fusable, read, slice};
use super::gradients::add_gradient;

/// `table (V, D)`, `tokens (N)` u32 → `(N, D)`.
///
/// # Errors
/// A token outside the table.
pub fn embedding(table: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    if !fusable(&[table]) || !tokens.device().is_cpu() {
        return table.index_select(tokens, 0);
    }
    let tokens: Vec<u32> = tokens.to_vec1()?;
    let size = table.dim(0)?;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= size) {
        bail!("embedding: expected tokens below the vocabulary's size {size}, found {token}");
    }
    table.contiguous()?.apply_op1(Embedding { tokens })
}

/// The operation.
struct Embedding {
    tokens: Vec<u32>,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (table, d) = (slice(table, at)?, at.shape().dims2()?.1);
        let mut x = Vec::with_capacity(self.tokens.len() * d);
        self.tokens.iter().for_each(|&token| x.extend_from_slice(&table[token as usize * d..][..d]));
        Ok((CpuStorage::F32(x), Shape::from((self.tokens.len(), d))))
    }

    fn bwd(&self, table: &Tensor, _x: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let d = table.dim(1)?;
        read([g], |[g]| {
            add_gradient(table, |sum, accum| {
                if let Accum::Replace = accum {
                    sum.fill(0.0);
                }
                for (&token, g) in self.tokens.iter().zip(g.chunks_exact(d)) {
                    axpy(&mut sum[token as usize * d..][..d], 1.0, g);
                }
            })
        })
    }
}

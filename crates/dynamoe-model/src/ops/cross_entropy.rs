//! Weighted cross entropy of each token: `weight · (logsumexp(logits) - logits[target])`. Its gradient with respect to the
//! logits is `weight · (softmax - onehot)`.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{exp, fusable, max, read, slice, sum};

/// `logits (N, V)`, `targets (N)` u32, `weights (N)` → losses `(N)` in nats. Only the logits get a gradient.
///
/// # Errors
/// Shapes or dtypes that do not fit, a target outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let shape = logits.dims2()?;
    if !fusable(&[logits, weights]) || !targets.device().is_cpu() {
        return cross_entropy_composed(logits, targets, weights);
    }
    check(shape, targets, weights)?;
    let (targets, weights) = (targets.to_vec1()?, weights.to_vec1()?);
    logits.contiguous()?.apply_op1(CrossEntropy { targets, weights, log_sums: OnceLock::new() })
}

/// Checks targets and weights against logits `(n, v)`.
pub(super) fn check((n, v): (usize, usize), targets: &Tensor, weights: &Tensor) -> Result<()> {
    if targets.dims() != [n] || weights.dims() != [n] || targets.dtype() != DType::U32 {
        bail!(
            "cross entropy: expected {n} targets of u32 and {n} weights, found {:?} of {:?} and {:?}",
            targets.dims(),
            targets.dtype(),
            weights.dims()
        );
    }
    match targets.to_vec1::<u32>()?.iter().find(|&&target| target as usize >= v) {
        Some(target) => {
            bail!("cross entropy: expected targets below the vocabulary's size {v}, found {target}")
        }
        None => Ok(()),
    }
}

/// [`cross_entropy`], composed of candle's operations.
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_composed(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let log_probabilities = candle_nn::ops::log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?;
    let losses = log_probabilities.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    losses.mul(&weights.detach().to_dtype(DType::F32)?)
}

/// The operation, for one forward and one backward pass.
struct CrossEntropy {
    targets: Vec<u32>,
    weights: Vec<f32>,
    /// `logsumexp` of each row. The forward pass leaves it for the backward pass.
    log_sums: OnceLock<Vec<f32>>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, v) = at.shape().dims2()?;
        let logits = slice(logits, at)?;
        let log_sums: Vec<f32> = logits
            .par_chunks(v)
            .map(|row| {
                let max = max(row);
                max + sum(row, |x| exp(x - max)).ln()
            })
            .collect();
        let losses = (0..n)
            .map(|n| self.weights[n] * (log_sums[n] - logits[n * v + self.targets[n] as usize]))
            .collect();
        // An operation runs forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(losses), Shape::from(n)))
    }

    fn bwd(&self, logits: &Tensor, _losses: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let v = logits.dim(1)?;
        let Some(log_sums) = self.log_sums.get() else {
            bail!("cross_entropy: expected the forward pass to run first");
        };
        let gradient = read([logits, g], |[logits, g]| {
            let mut gradient = vec![0f32; logits.len()];
            gradient.par_chunks_mut(v).zip(logits.par_chunks(v)).enumerate().for_each(|(n, (to, row))| {
                let (scale, log_sum) = (g[n] * self.weights[n], log_sums[n]);
                for (to, &x) in to.iter_mut().zip(row) {
                    *to = scale * exp(x - log_sum);
                }
                to[self.targets[n] as usize] -= scale;
            });
            Ok(gradient)
        })?;
        Tensor::from_vec(gradient, logits.shape(), logits.device()).map(Some)
    }
}

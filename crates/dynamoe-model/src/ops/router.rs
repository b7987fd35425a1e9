//! A router's logits, `W₂ silu(W₁ x + b₁) + b₂`, as one operation, always in f32: a route hangs on
//! small differences. Gradients with respect to the weights go straight into
//! [`super::Gradients`].

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use dynamoe::math::sigmoid;
use faer::Accum;
use rayon::prelude::*;

use super::cpu::{axpy, blocks, fusable, host, matrix, read, rows_per_block, slice};
use super::gradients::{hand_over_bias, hand_over_matrix};
use super::linear;
use super::product::multiply;

/// The weights of one layer's router.
#[derive(Debug, Clone)]
pub struct RouterWeights {
    /// `(R, D)` and `(R)`
    pub fc1: [Tensor; 2],
    /// `(E-1, R)` and `(E-1)`
    pub fc2: [Tensor; 2],
}

impl RouterWeights {
    /// `x (N, D)` → `(N, E-1)`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let weights = self.fc1.iter().chain(&self.fc2).collect::<Vec<_>>();
        if !(fusable(&weights) && fusable(&[x]) && weights.iter().all(|weight| weight.is_contiguous())) {
            return self.logits_composed(x);
        }
        let ((r, d), (scores, from)) = (self.fc1[0].dims2()?, self.fc2[0].dims2()?);
        if x.dims2()?.1 != d || from != r || self.fc1[1].dims() != [r] || self.fc2[1].dims() != [scores] {
            bail!(
                "router: expected rows of {d} numbers and weights that fit, found {:?} and {self:?}",
                x.dims()
            );
        }
        let trained = weights.iter().copied().find(|weight| weight.track_op()).unwrap_or(&self.fc1[0]);
        x.contiguous()?.apply_op2(trained, Fused { weights: self.clone(), hidden: OnceLock::new() })
    }

    /// [`RouterWeights::logits`], composed of smaller operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits_composed(&self, x: &Tensor) -> Result<Tensor> {
        let ([w1, b1], [w2, b2]) = (&self.fc1, &self.fc2);
        linear(&linear(x, w1)?.broadcast_add(b1)?.silu()?, w2)?.broadcast_add(b2)
    }
}

/// The operation, for one forward and one backward pass.
struct Fused {
    weights: RouterWeights,
    /// `W₁ x + b₁`, `(N, R)`.
    hidden: OnceLock<Vec<f32>>,
}

impl CustomOp2 for Fused {
    fn name(&self) -> &'static str {
        "router"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        _trained: &CpuStorage,
        _trained_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((n, d), x) = (x_at.shape().dims2()?, slice(x, x_at)?);
        let [w1, b1, w2, b2] = self.tensors().map(host);
        let (w1, b1, w2, b2) = (w1?, b1?, w2?, b2?);
        let (r, scores, rows) = (b1.len(), b2.len(), rows_per_block(n));
        let (mut hidden, mut logits) = (vec![0f32; n * r], vec![0f32; n * scores]);
        let out = blocks([(&mut hidden[..], r), (&mut logits[..], scores)], rows, n);
        out.into_par_iter().zip(x.par_chunks(rows * d)).for_each(|([hidden, logits], x)| {
            multiply(hidden, Accum::Replace, matrix(x, d), matrix(&w1, d).transpose());
            hidden.chunks_exact_mut(r).for_each(|row| axpy(row, 1.0, &b1));
            let active: Vec<f32> = hidden.iter().map(|&x| x * sigmoid(x)).collect();
            multiply(logits, Accum::Replace, matrix(&active, r), matrix(&w2, r).transpose());
            logits.chunks_exact_mut(scores).for_each(|row| axpy(row, 1.0, &b2));
        });
        // An operation runs forward once.
        let _ = self.hidden.set(hidden);
        Ok((CpuStorage::F32(logits), Shape::from((n, scores))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _trained: &Tensor,
        _logits: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(hidden) = self.hidden.get() else {
            bail!("router: expected the forward pass to run first");
        };
        read([x, g], |[x_values, g]| {
            let ((n, d), [w1, b1, w2, b2]) = (x.dims2()?, self.tensors());
            let (r, scores, rows) = (b1.elem_count(), b2.elem_count(), rows_per_block(n));
            let mut dx = vec![0f32; n * d];
            let (mut d_hidden, mut active) = (vec![0f32; n * r], vec![0f32; n * r]);
            {
                let (w1, w2) = (host(w1)?, host(w2)?);
                let out = blocks([(&mut dx[..], d), (&mut d_hidden, r), (&mut active, r)], rows, n);
                let inputs = hidden.par_chunks(rows * r).zip(g.par_chunks(rows * scores));
                out.into_par_iter().zip(inputs).for_each(|([dx, d_hidden, active], (hidden, g))| {
                    multiply(d_hidden, Accum::Replace, matrix(g, scores), matrix(&w2, r));
                    for ((d_hidden, active), &x) in d_hidden.iter_mut().zip(active).zip(hidden) {
                        let sigma = sigmoid(x);
                        *active = x * sigma;
                        *d_hidden *= sigma + x * sigma * (1.0 - sigma);
                    }
                    multiply(dx, Accum::Replace, matrix(d_hidden, r), matrix(&w1, d));
                });
            }
            for (weight, bias, g, x) in [(w1, b1, &d_hidden[..], x_values), (w2, b2, g, &active)] {
                hand_over_matrix("router", weight, g, x)?;
                hand_over_bias("router", bias, g)?;
            }
            Ok((Some(Tensor::from_vec(dx, (n, d), x.device())?), None))
        })
    }
}

impl Fused {
    fn tensors(&self) -> [&Tensor; 4] {
        let RouterWeights { fc1: [w1, b1], fc2: [w2, b2] } = &self.weights;
        [w1, b1, w2, b2]
    }
}

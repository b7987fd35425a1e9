//! The router: how difficult is this token for this layer?
//!
//! ```text
//! logits = fc2 · silu(fc1 · x + b1) + b2          x (T, D) → logits (T, E-1), always in f32
//! score_e = sigmoid(logit_e)                      how well expert e would do, for e < E-1
//! expert  = the smallest e with score_e ≥ sensitivity, else E-1
//! ```
//!
//! The comparison is made on logits, against `logit(sensitivity)`, so that no two implementations can differ
//! by the rounding of a sigmoid. For one token a larger sensitivity never gives a narrower expert.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Linear, Module};

use crate::config::DynaMoeConfig;
use crate::error::{Error, Result};
use crate::tensors::{self, Get};

/// The value that a router's logits are compared with: `ln(s / (1 - s))`, so −∞ at 0 and +∞ at 1.
pub fn logit(sensitivity: f64) -> f32 {
    (sensitivity / (1.0 - sensitivity)).ln() as f32
}

/// The smallest expert whose logit reaches `threshold`, else the largest, `logits.len()`.
/// A logit that is not a number never does, so a broken router costs time, not quality.
pub fn choose(logits: &[f32], threshold: f32) -> usize {
    logits.iter().position(|&l| l >= threshold).unwrap_or(logits.len())
}

/// The router of one layer.
#[derive(Debug, Clone)]
pub enum Router {
    /// Scores each token with a small MLP.
    Mlp {
        /// `(R, D)` with bias, f32.
        fc1: Linear,
        /// `(E-1, R)` with bias, f32.
        fc2: Linear,
    },
    /// The same logits for every token: `logit(H_e / I)`.
    Static(Vec<f32>),
}

impl Router {
    /// Reads the router that `config` describes, in f32.
    ///
    /// # Errors
    /// Those of [`tensors::read`].
    pub fn load(config: &DynaMoeConfig, hidden_size: usize, get: &mut Get) -> Result<Self> {
        let Some(table) = tensors::router(config, hidden_size) else {
            return Ok(Self::of_widths(&config.expert_widths));
        };
        let mut read = |named| Ok::<_, Error>(tensors::read(named, get)?.to_dtype(DType::F32)?);
        let [fc1_weight, fc1_bias, fc2_weight, fc2_bias] = &table;
        let fc1 = Linear::new(read(fc1_weight)?, Some(read(fc1_bias)?));
        let fc2 = Linear::new(read(fc2_weight)?, Some(read(fc2_bias)?));
        Ok(Self::Mlp { fc1, fc2 })
    }

    /// The static router over experts of these widths.
    pub fn of_widths(expert_widths: &[usize]) -> Self {
        let full = expert_widths.last().copied().unwrap_or(1) as f64;
        let smaller = &expert_widths[..expert_widths.len().saturating_sub(1)];
        Self::Static(smaller.iter().map(|&w| logit(w as f64 / full)).collect())
    }

    /// Logits `(T, E-1)` in f32 for `x (T, D)` of any float type.
    ///
    /// # Errors
    /// candle's, for a shape that does not fit.
    pub fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Mlp { fc1, fc2 } => {
                let x = x.to_dtype(DType::F32)?;
                crate::cpu::router_logits(fc1, fc2, &x)
                    .unwrap_or_else(|| fc2.forward(&fc1.forward(&x)?.silu()?))
            }
            Self::Static(logits) => {
                Tensor::new(logits.as_slice(), x.device())?.broadcast_as((x.dim(0)?, logits.len()))
            }
        }
    }

    /// The expert of every row of `x (T, D)`; `thresholds` holds one value for all rows or one for each
    /// (see [`logit`]).
    ///
    /// # Errors
    /// A number of thresholds that is neither 1 nor T.
    pub fn route(&self, x: &Tensor, thresholds: &[f32]) -> candle_core::Result<Vec<usize>> {
        let tokens = x.dim(0)?;
        if thresholds.len() != 1 && thresholds.len() != tokens {
            candle_core::bail!("router: expected 1 or {tokens} sensitivities, found {}", thresholds.len());
        }
        let threshold = |row: usize| thresholds[if thresholds.len() == 1 { 0 } else { row }];
        if let Self::Static(logits) = self {
            return Ok((0..tokens).map(|row| choose(logits, threshold(row))).collect());
        }
        let logits = self.logits(x)?;
        let width = logits.dim(D::Minus1)?;
        if width == 0 {
            return Ok(vec![0; tokens]);
        }
        let logits = logits.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(logits.chunks_exact(width).enumerate().map(|(row, l)| choose(l, threshold(row))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ends_of_the_dial_do_not_depend_on_the_router() {
        for logits in [[-1e30f32, 0.0, 1e30], [f32::MAX, f32::MIN, 0.0], [f32::INFINITY, 0.0, 0.0]] {
            assert_eq!(choose(&logits, logit(0.0)), 0);
        }
        assert_eq!(choose(&[1e30, f32::MAX, 0.0], logit(1.0)), 3);
        assert_eq!(choose(&[f32::NAN, f32::NAN], logit(0.0)), 2);
    }

    #[test]
    fn a_static_router_takes_the_first_expert_at_least_as_wide_as_the_dial() {
        let x = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        let router = Router::of_widths(&[16, 32, 48, 64]);
        for (sensitivity, expert) in
            [(0.0, 0), (0.25, 0), (0.26, 1), (0.5, 1), (0.75, 2), (0.76, 3), (1.0, 3)]
        {
            assert_eq!(router.route(&x, &[logit(sensitivity)]).unwrap(), [expert], "{sensitivity}");
        }
    }

    proptest! {
        #[test]
        fn raising_the_dial_never_narrows(
            logits in prop::collection::vec(-20f32..20.0, 0..8), a in 0f64..=1.0, b in 0f64..=1.0,
        ) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(choose(&logits, logit(low)) <= choose(&logits, logit(high)));
        }
    }
}

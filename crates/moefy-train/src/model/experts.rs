//! Nested experts for measuring: [`PrefixExperts`], with blocks of rows that stay in the cache for f32 on the CPU.

use candle_core::{Result, Tensor};
use candle_nn::Activation;
use dynamoe::{NestedExperts, PrefixExperts};

use super::ops::expert_rows;

/// The experts of one FFN.
#[derive(Debug, Clone)]
pub struct Experts {
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    prefixes: PrefixExperts,
}

impl Experts {
    /// `gate_proj (I, D)`, `up_proj (I, D)`, `down_proj (D, I)`, neurons in order of importance.
    ///
    /// # Errors
    /// Shapes that do not fit each other, widths that do not fit `I`.
    pub fn new(
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        widths: &[usize],
    ) -> dynamoe::Result<Self> {
        let tensors = (gate_proj.clone(), up_proj.clone(), down_proj.clone());
        let prefixes = PrefixExperts::new(tensors.0, tensors.1, tensors.2, Activation::Silu, widths)?;
        Ok(Self { gate_proj, up_proj, down_proj, prefixes })
    }
}

impl NestedExperts for Experts {
    fn widths(&self) -> &[usize] {
        self.prefixes.widths()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let weights = [&self.gate_proj, &self.up_proj, &self.down_proj];
        match expert_rows(weights, self.widths(), x, reach)? {
            Some(y) => Ok(y),
            None => self.prefixes.forward(x, reach),
        }
    }
}

//! Nested experts for measuring: [`PrefixExperts`], with blocks of rows that stay in the cache for f32 on the CPU.

use candle_core::{Result, Tensor};
use candle_nn::Activation;
use dynamoe::{NestedExperts, PrefixExperts};

use crate::ops::expert_rows;

/// The experts of one FFN.
#[derive(Debug, Clone)]
pub struct Experts {
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    prefixes: PrefixExperts,
    narrow: Option<Box<Self>>,
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
        Ok(Self { gate_proj, up_proj, down_proj, prefixes, narrow: None })
    }

    /// The same with first neurons of narrow experts' own, as [`PrefixExperts::with_own`]; these become copies.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn with_own(self, own: [&Tensor; 3]) -> dynamoe::Result<Self> {
        let prefixes = self.prefixes.with_own(own)?;
        let narrow = match prefixes.narrow() {
            Some(narrow) => {
                let [gate, up, down] = narrow.matrices().map(Tensor::clone);
                Some(Box::new(Self::new(gate, up, down, narrow.widths())?))
            }
            None => None,
        };
        Ok(Self { prefixes, narrow, ..self })
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

    fn own_shells(&self) -> usize {
        self.prefixes.own_shells()
    }

    fn narrow_experts(&self) -> Option<&dyn NestedExperts> {
        self.narrow.as_deref().map(|narrow| narrow as _)
    }
}

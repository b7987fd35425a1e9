//! Nested experts for measuring: [`PrefixExperts`], with blocks of rows that stay in the cache for f32 on the CPU.

use candle_core::{Result, Tensor};
use dynamoe::experts::rows;
use dynamoe::{HiddenAct, NestedExperts, PrefixExperts, Projections};

use crate::ops::expert_rows;

/// The experts of one FFN.
#[derive(Debug, Clone)]
pub struct Experts {
    prefixes: PrefixExperts,
    hidden_act: HiddenAct,
    smaller: Option<Box<Self>>,
}

impl Experts {
    /// gate and up `(I, D)` and down `(D, I)`, neurons in order of importance.
    ///
    /// # Errors
    /// Shapes that do not fit each other, widths that do not fit `I`.
    pub fn new(
        matrices: Projections<Tensor>,
        hidden_act: HiddenAct,
        widths: &[usize],
    ) -> dynamoe::Result<Self> {
        let prefixes = PrefixExperts::new(matrices, hidden_act.into(), widths)?;
        Ok(Self { prefixes, hidden_act, smaller: None })
    }

    /// gate and up `(I, D)` and down `(D, I)` of the largest expert, neurons in order of importance.
    pub fn matrices(&self) -> &Projections<Tensor> {
        self.prefixes.matrices()
    }

    /// Adds separate weights for the smaller experts, as [`PrefixExperts::with_separate`], which copies.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn with_separate(self, separate: &Projections<Tensor>) -> dynamoe::Result<Self> {
        let (hidden_act, prefixes) = (self.hidden_act, self.prefixes.with_separate(separate)?);
        let smaller = prefixes.smaller().cloned();
        let smaller = smaller.map(|prefixes| Box::new(Self { prefixes, hidden_act, smaller: None }));
        Ok(Self { prefixes, hidden_act, smaller })
    }
}

impl NestedExperts for Experts {
    fn widths(&self) -> &[usize] {
        self.prefixes.widths()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match expert_rows(self.prefixes.matrices(), self.hidden_act, self.widths(), x, reach)? {
            Some(y) => Ok(y),
            None => self.prefixes.forward(x, reach),
        }
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        let smaller = self.smaller.as_deref()?;
        Some(rows(x, order).and_then(|x| smaller.forward(&x, reach)))
    }
}

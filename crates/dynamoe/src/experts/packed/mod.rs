//! Experts as shells of packed matrices: the whole FFN in one parallel region.
//!
//! ```text
//! h   = act(W_gate x) ∘ (W_up x)       x rounded to 8 bits once
//! y   = Σ_s W_down,s · h_s             h rounded to 8 bits once, shells added in their order
//! ```
//!
//! Rows are sorted by expert as they are rounded, so that shell `s` serves the first `reach[s]` of them. They are put
//! back as results are stored. No row is copied for that.

mod pass;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::Activation;

use super::{NestedExperts, Projections, rows};
use crate::cpu::{Host, Isa, PackedMatrix};
use pass::Task;

/// Experts as shells of packed matrices, each of any type that can be packed.
#[derive(Debug, Clone)]
pub struct PackedExperts {
    shells: Vec<Projections<Arc<PackedMatrix>>>,
    activation: Activation,
    widths: Vec<usize>,
    hidden_size: usize,
    smaller: Option<Arc<Self>>,
}

impl PackedExperts {
    /// `widths` are those of the experts (cumulative), one for each shell; `gate_proj`, `up_proj`
    /// `(shell width, D)`, `down_proj (D, shell width)`.
    ///
    /// # Errors
    /// [`crate::Error::Widths`] if widths do not increase or are not as many as the shells,
    /// [`crate::Error::Shape`] for a matrix of another shape; an activation that changes its input's shape.
    pub fn new(
        shells: Vec<Projections<Arc<PackedMatrix>>>,
        activation: Activation,
        widths: &[usize],
    ) -> crate::Result<Self> {
        let full = widths.last().copied().unwrap_or(0);
        crate::config::check_widths(widths, full)?;
        if shells.len() != widths.len() {
            return Err(crate::Error::Widths { widths: widths.to_vec(), intermediate_size: full });
        }
        let hidden_size = shells[0].down_proj.shape().0;
        let mut start = 0;
        for (shell, &end) in shells.iter().zip(widths) {
            let expected = crate::tensors::dense(end - start, hidden_size).into_array();
            for (matrix, (name, expected)) in shell.as_ref().into_array().into_iter().zip(expected) {
                let found = vec![matrix.shape().0, matrix.shape().1];
                if found != expected {
                    let tensor = format!("{name}, shell of neurons {start} to {end}");
                    return Err(crate::Error::Shape { tensor, expected, found });
                }
            }
            start = end;
        }
        if activation == Activation::Swiglu {
            let problem = "activation swiglu is not one of single numbers: use silu";
            return Err(candle_core::Error::Msg(problem.into()).into());
        }
        let widths = widths.to_vec();
        Ok(Self { shells, activation, widths, hidden_size, smaller: None })
    }

    /// Adds separate weights for the smaller experts, in place of as many first shells; they share the other shells.
    ///
    /// # Errors
    /// As many shells as experts, or more; as [`PackedExperts::new`].
    pub fn with_separate(self, separate: Vec<Projections<Arc<PackedMatrix>>>) -> crate::Result<Self> {
        crate::config::check_separate_shells(separate.len(), self.shells.len())?;
        if separate.is_empty() {
            return Ok(Self { smaller: None, ..self });
        }
        let smaller = self.shells.len() - 1;
        let shared = self.shells[separate.len()..smaller].iter().cloned();
        let shells = separate.into_iter().chain(shared).collect();
        let smaller = Self::new(shells, self.activation, &self.widths[..smaller])?;
        Ok(Self { smaller: Some(Arc::new(smaller)), ..self })
    }

    /// The shells, narrowest expert's first.
    pub fn shells(&self) -> &[Projections<Arc<PackedMatrix>>] {
        &self.shells
    }

    /// The activation.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// [`NestedExperts::forward_unsorted`] on one variant of the kernels.
    fn forward_ordered(&self, isa: Isa, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        let (tokens, d) = x.dims2()?;
        let valid = reach.len() == self.shells.len() && reach[0] == tokens && order.len() == tokens;
        let rows_exist = order.iter().all(|&row| (row as usize) < tokens);
        if d != self.hidden_size || !valid || !rows_exist || reach.windows(2).any(|w| w[1] > w[0]) {
            bail!(
                "packed experts: expected x (T, {}) with {} decreasing reaches from T and T rows in order, found {:?}, {reach:?} and {} rows",
                self.hidden_size,
                self.shells.len(),
                x.dims(),
                order.len()
            );
        }
        let rows = x.to_dtype(DType::F32)?.contiguous()?;
        let task = Task {
            isa,
            shells: &self.shells,
            activation: self.activation,
            widths: &self.widths,
            hidden_size: self.hidden_size,
            x: &Host::of(&rows)?,
            order,
            reach,
        };
        Tensor::from_vec(task.run()?, (tokens, d), &Device::Cpu)?.to_dtype(x.dtype())
    }
}

impl NestedExperts for PackedExperts {
    fn widths(&self) -> &[usize] {
        &self.widths
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let order: Vec<u32> = (0..x.dim(0)? as u32).collect();
        self.forward_ordered(Isa::best(), x, &order, reach)
    }

    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        self.forward_ordered(Isa::best(), x, order, reach)
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        let smaller = self.smaller.as_deref()?;
        Some(rows(x, order).and_then(|x| smaller.forward(&x, reach)))
    }
}

//! Experts as prefixes of the dense FFN's matrices.

use candle_core::{Result, Tensor};
use candle_nn::Activation;
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::{Segment as CudaSegment, Segments as CudaSegments, Weight as CudaWeight};

use super::glu::{Glu, glu};
use super::{NestedExperts, Projections, rows};
use crate::tensors;

/// Experts as prefixes of the dense matrices: nothing is copied, and each group of rows with the same expert
/// takes one product with a prefix of each matrix.
#[derive(Debug, Clone)]
pub struct PrefixExperts {
    matrices: Projections<Tensor>,
    activation: Activation,
    glu: Glu,
    widths: Vec<usize>,
    smaller: Option<Box<Self>>,
    /// `P`, the number of neurons with separate weights.
    #[cfg(feature = "cuda")]
    separate_size: usize,
}

impl PrefixExperts {
    /// gate and up `(I, D)` and down `(D, I)`, neurons in order of importance.
    ///
    /// # Errors
    /// Shapes that do not fit each other, widths that do not fit `I`.
    pub fn new(
        matrices: Projections<Tensor>,
        activation: Activation,
        widths: &[usize],
    ) -> crate::Result<Self> {
        let (i, d) = matrices.gate_proj.dims2()?;
        let expected = tensors::dense(i, d).into_array();
        for (tensor, (name, expected)) in matrices.as_ref().into_array().into_iter().zip(expected) {
            if tensor.dims() != expected {
                let found = tensor.dims().to_vec();
                return Err(crate::Error::Shape { tensor: name.into(), expected, found });
            }
        }
        crate::config::check_widths(widths, i)?;
        Ok(Self {
            matrices,
            activation,
            glu,
            widths: widths.to_vec(),
            smaller: None,
            #[cfg(feature = "cuda")]
            separate_size: 0,
        })
    }

    /// Adds separate weights for the first neurons of the smaller experts: gate and up `(P, D)` and down `(D, P)`,
    /// where `P` is the width of one of these. The smaller experts become whole matrices.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn with_separate(self, separate: &Projections<Tensor>) -> crate::Result<Self> {
        let p = separate.gate_proj.dim(0)?;
        let widths = smaller_widths(&self.widths, p)?;
        let rest = widths[widths.len() - 1] - p;
        let extend =
            |first: &Tensor, dense: &Tensor, dim| Tensor::cat(&[first, &dense.narrow(dim, p, rest)?], dim);
        let matrices = Projections {
            gate_proj: extend(&separate.gate_proj, &self.matrices.gate_proj, 0)?,
            up_proj: extend(&separate.up_proj, &self.matrices.up_proj, 0)?,
            down_proj: extend(&separate.down_proj, &self.matrices.down_proj, 1)?,
        };
        let smaller = Self::new(matrices, self.activation, widths)?.with_glu(self.glu);
        Ok(Self {
            smaller: Some(Box::new(smaller)),
            #[cfg(feature = "cuda")]
            separate_size: p,
            ..self
        })
    }

    /// The same with another implementation of `act(gate) ∘ up`, an engine's fused one.
    pub fn with_glu(self, glu: Glu) -> Self {
        let smaller = self.smaller.map(|smaller| Box::new(smaller.with_glu(glu)));
        Self { glu, smaller, ..self }
    }

    /// The smaller experts, where they have separate weights.
    pub fn smaller(&self) -> Option<&Self> {
        self.smaller.as_deref()
    }

    /// gate and up `(I, D)`, down `(D, I)`.
    pub fn matrices(&self) -> &Projections<Tensor> {
        &self.matrices
    }

    /// `O_e(x)` for all rows of `x (T, D)`.
    pub fn expert(&self, x: &Tensor, expert: usize) -> Result<Tensor> {
        let width = self.widths[expert];
        let Projections { gate_proj, up_proj, down_proj } = &self.matrices;
        let gate = x.matmul(&gate_proj.narrow(0, 0, width)?.t()?)?; // (T, H_e)
        let up = x.matmul(&up_proj.narrow(0, 0, width)?.t()?)?; // (T, H_e)
        let h = (self.glu)(&gate, &up, self.activation)?;
        h.matmul(&down_proj.narrow(1, 0, width)?.t()?) // (T, D)
    }

    /// The first `width` neurons, in place.
    #[cfg(feature = "cuda")]
    fn cuda_prefix(&self, width: usize) -> Result<CudaSegment> {
        let Projections { gate_proj, up_proj, down_proj } = &self.matrices;
        Ok(CudaSegment {
            gate_proj: CudaWeight::Float(gate_proj.narrow(0, 0, width)?),
            up_proj: CudaWeight::Float(up_proj.narrow(0, 0, width)?),
            down_proj: CudaWeight::Float(down_proj.narrow(1, 0, width)?),
        })
    }
}

impl NestedExperts for PrefixExperts {
    fn widths(&self) -> &[usize] {
        &self.widths
    }

    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<CudaSegments> {
        if !super::glu::is_silu(self.activation) {
            return None;
        }
        let dense = self.cuda_prefix(*self.widths.last()?).ok()?;
        let separate = self.smaller.as_deref().map(|smaller| smaller.cuda_prefix(self.separate_size));
        let separate = separate.transpose().ok()?.into_iter().collect();
        Some(CudaSegments { dense: vec![dense], separate })
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let mut groups = Vec::new();
        let mut start = 0;
        for (expert, &rows) in reach.iter().enumerate().rev() {
            if rows == x.dim(0)? && start == 0 {
                return self.expert(x, expert);
            }
            if rows > start {
                groups.push(self.expert(&x.narrow(0, start, rows - start)?, expert)?);
                start = rows;
            }
        }
        if groups.is_empty() { x.zeros_like() } else { Tensor::cat(&groups, 0) }
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        let smaller = self.smaller.as_deref()?;
        Some(rows(x, order).and_then(|x| smaller.forward(&x, reach)))
    }
}

/// Checks that `separate` first neurons can have separate weights; returns the widths of the smaller experts.
fn smaller_widths(widths: &[usize], separate: usize) -> crate::Result<&[usize]> {
    let (_, smaller) = widths.split_last().unwrap_or((&0, &[]));
    if smaller.contains(&separate) {
        return Ok(smaller);
    }
    Err(crate::Error::Config(format!(
        "separate weights of the smaller experts must be for as many neurons as one of these has, {smaller:?}, found {separate}"
    )))
}

//! Experts as prefixes of the dense FFN's matrices.

use candle_core::{Result, Tensor};
use candle_nn::Activation;
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::{Segment as CudaSegment, Weight as CudaWeight};

use super::NestedExperts;
use super::glu::{Glu, glu};

/// Experts as prefixes of the dense matrices: nothing is copied, and each group of rows with the same expert
/// takes one product with a prefix of each matrix.
#[derive(Debug, Clone)]
pub struct PrefixExperts {
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation,
    glu: Glu,
    widths: Vec<usize>,
    own_shells: usize,
    narrow: Option<Box<Self>>,
}

impl PrefixExperts {
    /// `gate_proj (I, D)`, `up_proj (I, D)`, `down_proj (D, I)`, neurons in order of importance.
    ///
    /// # Errors
    /// Shapes that do not fit each other, widths that do not fit `I`.
    pub fn new(
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        activation: Activation,
        widths: &[usize],
    ) -> crate::Result<Self> {
        let (i, d) = gate_proj.dims2()?;
        for (tensor, name, expected) in
            [(&up_proj, crate::names::UP_PROJ, [i, d]), (&down_proj, crate::names::DOWN_PROJ, [d, i])]
        {
            if tensor.dims() != expected {
                let (expected, found) = (expected.to_vec(), tensor.dims().to_vec());
                return Err(crate::Error::Shape { tensor: name.into(), expected, found });
            }
        }
        crate::config::check_widths(widths, i)?;
        let widths = widths.to_vec();
        Ok(Self { gate_proj, up_proj, down_proj, activation, glu, widths, own_shells: 0, narrow: None })
    }

    /// The same with first neurons of narrow experts' own: `own` is their gate `(P, D)`, up `(P, D)` and down `(D, P)`,
    /// where `P` is the width of a narrow expert. Narrow experts become matrices of their own.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn with_own(self, own: [&Tensor; 3]) -> crate::Result<Self> {
        let p = own[0].dim(0)?;
        let narrower = narrow_widths(&self.widths, p)?;
        let rest = narrower[narrower.len() - 1] - p;
        let behind =
            |own: &Tensor, dense: &Tensor, dim| Tensor::cat(&[own, &dense.narrow(dim, p, rest)?], dim);
        let narrow = Self::new(
            behind(own[0], &self.gate_proj, 0)?,
            behind(own[1], &self.up_proj, 0)?,
            behind(own[2], &self.down_proj, 1)?,
            self.activation,
            narrower,
        )?;
        let own_shells = narrower.partition_point(|&width| width <= p);
        let narrow = Some(Box::new(narrow.with_glu(self.glu)));
        Ok(Self { own_shells, narrow, ..self })
    }

    /// The same with another implementation of `act(gate) ∘ up`, an engine's fused one.
    pub fn with_glu(self, glu: Glu) -> Self {
        let narrow = self.narrow.map(|narrow| Box::new(narrow.with_glu(glu)));
        Self { glu, narrow, ..self }
    }

    /// The narrow experts, where some of their neurons are their own.
    pub fn narrow(&self) -> Option<&Self> {
        self.narrow.as_deref()
    }

    /// gate, up and down.
    pub fn matrices(&self) -> [&Tensor; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// `O_e(x)` for all rows of `x (T, D)`.
    ///
    /// # Errors
    /// candle's.
    pub fn expert(&self, x: &Tensor, expert: usize) -> Result<Tensor> {
        let width = self.widths[expert];
        let gate = x.matmul(&self.gate_proj.narrow(0, 0, width)?.t()?)?; // (T, H_e)
        let up = x.matmul(&self.up_proj.narrow(0, 0, width)?.t()?)?; // (T, H_e)
        let h = (self.glu)(&gate, &up, self.activation)?;
        h.matmul(&self.down_proj.narrow(1, 0, width)?.t()?) // (T, D)
    }
}

impl NestedExperts for PrefixExperts {
    fn widths(&self) -> &[usize] {
        &self.widths
    }

    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<Vec<CudaSegment>> {
        let [gate_proj, up_proj, down_proj] =
            [&self.gate_proj, &self.up_proj, &self.down_proj].map(|w| CudaWeight::Float(w.clone()));
        super::glu::is_silu(self.activation).then(|| vec![CudaSegment { gate_proj, up_proj, down_proj }])
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

    fn own_shells(&self) -> usize {
        self.own_shells
    }

    fn narrow_experts(&self) -> Option<&dyn NestedExperts> {
        self.narrow.as_deref().map(|narrow| narrow as _)
    }
}

/// Checks that `own` first neurons can be narrow experts' own; returns the widths of these.
fn narrow_widths(widths: &[usize], own: usize) -> crate::Result<&[usize]> {
    let (_, narrower) = widths.split_last().unwrap_or((&0, &[]));
    if narrower.contains(&own) {
        return Ok(narrower);
    }
    Err(crate::Error::Config(format!(
        "narrow experts' own neurons must be as many as one of them is wide, {narrower:?}, found {own}"
    )))
}

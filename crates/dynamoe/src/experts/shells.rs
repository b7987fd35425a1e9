//! Experts as separate shells.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, Module};

use super::glu::{Glu, glu};
use super::{NestedExperts, Projections, rows};

/// Experts as separate shells, so that any projection serves, an engine's quantized ones too.
#[derive(Debug, Clone)]
pub struct ShellExperts<P> {
    shells: Vec<Projections<P>>,
    separate: Vec<Projections<P>>,
    activation: Activation,
    glu: Glu,
    widths: Vec<usize>,
}

impl<P> ShellExperts<P> {
    /// `widths` are those of the experts (cumulative), one for each shell.
    ///
    /// # Errors
    /// [`crate::Error::Widths`] if they do not increase or are not as many as the shells.
    pub fn new(shells: Vec<Projections<P>>, activation: Activation, widths: &[usize]) -> crate::Result<Self> {
        let full = widths.last().copied().unwrap_or(0);
        crate::config::check_widths(widths, full)?;
        if shells.len() != widths.len() {
            return Err(crate::Error::Widths { widths: widths.to_vec(), intermediate_size: full });
        }
        Ok(Self { shells, separate: Vec::new(), activation, glu, widths: widths.to_vec() })
    }

    /// Adds separate weights for the smaller experts, in place of as many first shells, of the same widths.
    ///
    /// # Errors
    /// As many shells as experts, or more.
    pub fn with_separate(self, separate: Vec<Projections<P>>) -> crate::Result<Self> {
        crate::config::check_separate_shells(separate.len(), self.shells.len())?;
        Ok(Self { separate, ..self })
    }

    /// The smaller experts' separate shells, narrowest expert's first.
    pub fn separate(&self) -> &[Projections<P>] {
        &self.separate
    }

    /// The shells and the smaller experts' separate ones, for an engine that quantizes them in place.
    pub fn all_mut(&mut self) -> (&mut [Projections<P>], &mut [Projections<P>]) {
        (&mut self.shells, &mut self.separate)
    }

    /// The same with another implementation of `act(gate) ∘ up`, an engine's fused one.
    pub fn with_glu(self, glu: Glu) -> Self {
        Self { glu, ..self }
    }

    /// The shells, narrowest expert's first.
    pub fn shells(&self) -> &[Projections<P>] {
        &self.shells
    }
}

impl<P: Module + Send + Sync> ShellExperts<P> {
    fn shell(&self, shell: &Projections<P>, x: &Tensor) -> Result<Tensor> {
        let Projections { gate_proj, up_proj, down_proj } = shell;
        down_proj.forward(&(self.glu)(&gate_proj.forward(x)?, &up_proj.forward(x)?, self.activation)?)
    }

    /// The sum over `shells` for rows sorted by expert.
    fn sum(&self, shells: &[&Projections<P>], x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        if x.dim(0)? == 0 {
            return x.zeros_like();
        }
        // from the outermost shell inwards: each sum has the rows of the next one as its head
        let mut sum: Option<Tensor> = None;
        for (shell, &rows) in shells.iter().zip(reach).rev().filter(|(_, rows)| **rows > 0) {
            let part = self.shell(shell, &x.narrow(0, 0, rows)?)?; // (rows, D)
            sum = Some(match sum {
                None => part,
                Some(wider) if wider.dim(0)? == rows => (wider + part)?,
                Some(wider) => {
                    let head = wider.dim(0)?;
                    let both = (wider + part.narrow(0, 0, head)?)?;
                    Tensor::cat(&[both, part.narrow(0, head, rows - head)?], 0)?
                }
            });
        }
        sum.map_or_else(|| Tensor::zeros(x.shape(), DType::F32, &Device::Cpu), Ok)
    }
}

impl<P: Module + Send + Sync> NestedExperts for ShellExperts<P> {
    fn widths(&self) -> &[usize] {
        &self.widths
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        self.sum(&self.shells.iter().collect::<Vec<_>>(), x, reach)
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        let separate = self.separate.len();
        let shells: Vec<_> = self.separate.iter().chain(&self.shells[separate..]).collect();
        (separate > 0).then(|| self.sum(&shells, &rows(x, order)?, reach))
    }
}

//! Experts as separate shells.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, Module};
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::{Segment as CudaSegment, Weight as CudaWeight};

use super::NestedExperts;
use super::glu::{Glu, glu};

/// One shell's projections, each mapping rows: `gate`, `up`: D → shell width, `down`: shell width → D.
#[derive(Debug, Clone)]
pub struct Shell<P> {
    /// `gate_proj`'s neurons of this shell.
    pub gate_proj: P,
    /// `up_proj`'s neurons of this shell.
    pub up_proj: P,
    /// `down_proj`'s neurons of this shell.
    pub down_proj: P,
}

/// Experts as separate shells, so that any projection serves, an engine's quantized ones too.
#[derive(Debug, Clone)]
pub struct ShellExperts<P> {
    shells: Vec<Shell<P>>,
    own: Vec<Shell<P>>,
    activation: Activation,
    glu: Glu,
    widths: Vec<usize>,
    #[cfg(feature = "cuda")]
    cuda_weight: fn(&P) -> Option<CudaWeight>,
}

impl<P> ShellExperts<P> {
    /// `widths` are those of the experts (cumulative), one for each shell.
    ///
    /// # Errors
    /// [`crate::Error::Widths`] if they do not increase or are not as many as the shells.
    pub fn new(shells: Vec<Shell<P>>, activation: Activation, widths: &[usize]) -> crate::Result<Self> {
        let full = widths.last().copied().unwrap_or(0);
        crate::config::check_widths(widths, full)?;
        if shells.len() != widths.len() {
            return Err(crate::Error::Widths { widths: widths.to_vec(), intermediate_size: full });
        }
        Ok(Self {
            shells,
            own: Vec::new(),
            activation,
            glu,
            widths: widths.to_vec(),
            #[cfg(feature = "cuda")]
            cuda_weight: |_| None,
        })
    }

    /// The same whose narrow experts have these in place of as many first shells, of the same widths.
    ///
    /// # Errors
    /// As many shells as experts, or more.
    pub fn with_own(self, own: Vec<Shell<P>>) -> crate::Result<Self> {
        crate::config::check_own_shells(own.len(), self.shells.len())?;
        Ok(Self { own, ..self })
    }

    /// Narrow experts' own shells, narrowest expert's first.
    pub fn own(&self) -> &[Shell<P>] {
        &self.own
    }

    /// The shells and narrow experts' own, for an engine that quantizes them in place.
    pub fn all_mut(&mut self) -> (&mut [Shell<P>], &mut [Shell<P>]) {
        (&mut self.shells, &mut self.own)
    }

    /// The same with another implementation of `act(gate) ∘ up`, an engine's fused one.
    pub fn with_glu(self, glu: Glu) -> Self {
        Self { glu, ..self }
    }

    /// `weight` says where a projection's matrix `(out, in)` lies on a CUDA device. It is asked in every pass, as
    /// engines quantize in place.
    #[cfg(feature = "cuda")]
    pub fn with_cuda_weights(self, weight: fn(&P) -> Option<CudaWeight>) -> Self {
        Self { cuda_weight: weight, ..self }
    }

    /// The shells, narrowest expert's first.
    pub fn shells(&self) -> &[Shell<P>] {
        &self.shells
    }

    /// The shells, for an engine that quantizes them in place.
    pub fn shells_mut(&mut self) -> &mut [Shell<P>] {
        &mut self.shells
    }
}

impl<P: Module + Send + Sync> ShellExperts<P> {
    fn shell(&self, shell: &Shell<P>, x: &Tensor) -> Result<Tensor> {
        let Shell { gate_proj, up_proj, down_proj } = shell;
        down_proj.forward(&(self.glu)(&gate_proj.forward(x)?, &up_proj.forward(x)?, self.activation)?)
    }

    /// The sum over `shells` for rows sorted by expert.
    fn sum(&self, shells: &[&Shell<P>], x: &Tensor, reach: &[usize]) -> Result<Tensor> {
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

    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<Vec<CudaSegment>> {
        let segment = |shell: &Shell<P>| {
            Some(CudaSegment {
                gate_proj: (self.cuda_weight)(&shell.gate_proj)?,
                up_proj: (self.cuda_weight)(&shell.up_proj)?,
                down_proj: (self.cuda_weight)(&shell.down_proj)?,
            })
        };
        super::glu::is_silu(self.activation).then(|| self.shells.iter().map(segment).collect())?
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        self.sum(&self.shells.iter().collect::<Vec<_>>(), x, reach)
    }

    fn own_shells(&self) -> usize {
        self.own.len()
    }

    fn forward_narrow(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let shells: Vec<_> = self.own.iter().chain(&self.shells[self.own.len()..]).collect();
        self.sum(&shells, x, reach)
    }
}

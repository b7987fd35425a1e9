//! Nested experts: expert `e` is the first `H_e` neurons of the FFN, so one set of weights serves all.
//!
//! ```text
//! h   = act(W_gate x) ∘ (W_up x)          (I)
//! O_e = W_down[:, :H_e] · h[:H_e]         the largest expert is the dense FFN
//! ```
//!
//! Shell `s` is the neurons `H_{s-1} .. H_s`; expert `e` is the sum of shells `0..=e`. Rows arrive sorted,
//! widest expert first, so that shell `s` serves the first `reach[s]` rows: a staircase.
//!
//! Tokens below full width may have other neurons in the first shells, narrow experts' own: then the largest expert is
//! still the dense FFN, and shares only the other shells with them.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, Module};
#[cfg(feature = "cuda")]
use dynamoe_kernels::cuda::{Segment as CudaSegment, Weight as CudaWeight};

/// The weights of a layer's experts, dense or quantized.
pub trait NestedExperts: Send + Sync {
    /// `H_e` of every expert, strictly increasing.
    fn widths(&self) -> &[usize];

    /// Runs rows that are sorted by expert, widest first.
    ///
    /// `x (T, D)` → `(T, D)`; `reach[s]` is the number of rows whose expert is at least `s`, so `reach[0] = T`
    /// and the list never increases.
    ///
    /// # Errors
    /// candle's.
    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor>;

    /// The weights in runs of neurons, if they lie on a CUDA device in a form that dynamoe-kernels may know. None
    /// is always right, and costs a layer on CUDA a wait for its routes.
    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<Vec<CudaSegment>> {
        None
    }

    /// Runs rows in any order: `order` lists all rows of `x (T, D)`, widest expert first; `reach` as for
    /// [`NestedExperts::forward`]. Results are in the order of `x`.
    ///
    /// # Errors
    /// candle's.
    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        let sorted = x.index_select(&Tensor::new(order, x.device())?, 0)?;
        self.forward(&sorted, reach)?.index_select(&Tensor::new(places(order), x.device())?, 0)
    }

    /// How many of the first shells are others for tokens below full width.
    fn own_shells(&self) -> usize {
        0
    }

    /// The experts of tokens below full width, where these are a set of their own.
    fn narrow_experts(&self) -> Option<&dyn NestedExperts> {
        None
    }

    /// Runs rows below full width, sorted by expert, widest first; `reach` as for [`NestedExperts::forward`], without
    /// the largest expert's.
    ///
    /// # Errors
    /// candle's.
    fn forward_narrow(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match self.narrow_experts() {
            Some(narrow) => narrow.forward(x, reach),
            None => self.forward(x, &[reach, &[0]].concat()),
        }
    }
}

/// Where each row stands in `order`.
pub(crate) fn places(order: &[u32]) -> Vec<u32> {
    let mut places = vec![0u32; order.len()];
    for (place, &row) in order.iter().enumerate() {
        places[row as usize] = place as u32;
    }
    places
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

/// `act(gate) ∘ up`, both `(…, n)`.
pub type Glu = fn(&Tensor, &Tensor, Activation) -> Result<Tensor>;

fn glu(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    activation.forward(gate)? * up
}

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
        is_silu(self.activation).then(|| vec![CudaSegment { gate_proj, up_proj, down_proj }])
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
        is_silu(self.activation).then(|| self.shells.iter().map(segment).collect())?
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

#[cfg(feature = "cuda")]
fn is_silu(activation: Activation) -> bool {
    matches!(activation, Activation::Silu | Activation::Swish)
}

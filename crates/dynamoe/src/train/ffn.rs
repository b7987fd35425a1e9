//! The differentiable forward: every expert's output, or a soft mixture of them, from one full-width pass.

use candle_core::{Result, Tensor, bail};

use super::glu::{glu, masked_glu, shell_ranges};
use crate::activation::HiddenAct;
use crate::experts::Projections;

/// The weights of one FFN while it is trained.
#[derive(Debug, Clone)]
pub struct TrainableFfn {
    /// `(I, D)`
    pub gate_proj: Tensor,
    /// `(I, D)`
    pub up_proj: Tensor,
    /// `(D, I)`
    pub down_proj: Tensor,
    /// The smaller experts' separate weights, in place of the dense FFN's first neurons: gate and up `(P, D)`, down
    /// `(D, P)`, where `P` is the width of one of these experts.
    pub separate: Option<Projections<Tensor>>,
    /// `(E-1, D)`
    pub compensation: Option<Tensor>,
    /// `H_e`, ending at `I`.
    pub widths: Vec<usize>,
    /// The activation of the gate.
    pub hidden_act: HiddenAct,
}

impl TrainableFfn {
    /// `Σ_e p_e O_e(x)` for `x (N, D)`, where `reach (N, E)` holds `reach_s = Σ_{e ≥ s} p_e`: 1 in its first
    /// column, never increasing along a row.
    pub fn forward(&self, x: &Tensor, reach: &Tensor) -> Result<Tensor> {
        self.forward_with(x, reach, |x, w| x.matmul(&w.t()?))
    }

    /// [`TrainableFfn::forward`] with a faster product `linear(x (N, in), weight (out, in)) → (N, out)`.
    ///
    /// # Errors
    /// candle's and those of `linear`.
    pub fn forward_with(
        &self,
        x: &Tensor,
        reach: &Tensor,
        linear: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let product = |ffn: &Self, reach: &Tensor| {
            let (gate, up) = (linear(x, &ffn.gate_proj)?, linear(x, &ffn.up_proj)?); // (N, I)
            let h = masked_glu(ffn.hidden_act, &gate, &up, reach, &ffn.widths)?;
            linear(&h, &ffn.down_proj) // (N, D)
        };
        let y = match self.split(reach)? {
            Some([(shared, of_shared), (separate, of_separate)]) => {
                (product(&shared, &of_shared)? + product(&separate, &of_separate)?)?
            }
            None => product(self, reach)?,
        };
        self.compensate(y, reach)
    }

    /// The dense FFN's neurons and the smaller experts' separate ones, each with its use of shells, without
    /// compensation; their outputs add up. None if there are no separate weights.
    ///
    /// # Errors
    /// candle's; separate weights for another number of neurons than a smaller expert has.
    pub fn split(&self, reach: &Tensor) -> Result<Option<[(Self, Tensor); 2]>> {
        let Some(separate) = &self.separate else { return Ok(None) };
        let (width, experts) = (separate.gate_proj.dim(0)?, self.widths.len());
        let Some(last) = self.widths[..experts - 1].iter().position(|&w| w == width) else {
            bail!(
                "separate weights: expected as many neurons as a smaller expert of {:?} has, found {width}",
                self.widths
            );
        };
        let shells = last + 1;
        let full = reach.narrow(1, experts - 1, 1)?; // (N, 1)
        let of_separate = reach.narrow(1, 0, shells)?.broadcast_sub(&full)?;
        let of_shared =
            [full.broadcast_as((reach.dim(0)?, shells))?, reach.narrow(1, shells, experts - shells)?];
        let Projections { gate_proj, up_proj, down_proj } = separate.clone();
        let separate = Self {
            gate_proj,
            up_proj,
            down_proj,
            separate: None,
            compensation: None,
            widths: self.widths[..shells].to_vec(),
            hidden_act: self.hidden_act,
        };
        let shared = Self { separate: None, compensation: None, ..self.clone() };
        Ok(Some([(shared, Tensor::cat(&of_shared, 1)?), (separate, of_separate)]))
    }

    /// Adds the compensation to `y (N, D)`.
    pub fn compensate(&self, y: Tensor, reach: &Tensor) -> Result<Tensor> {
        let smaller = self.widths.len() - 1;
        match &self.compensation {
            Some(compensation) if smaller > 0 => {
                // p_e = reach_e - reach_{e+1}
                let p = (reach.narrow(1, 0, smaller)? - reach.narrow(1, 1, smaller)?)?; // (N, E-1)
                y + p.matmul(compensation)?
            }
            _ => Ok(y),
        }
    }

    /// `O_e(x)` of every expert, narrowest first, each `(N, D)`, compensation included. Gradients flow through
    /// all of them; detach where they only label.
    pub fn expert_outputs(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let shells = |[gate, up, down]: [&Tensor; 3]| -> Result<Vec<Tensor>> {
            let h = glu(self.hidden_act, &x.matmul(&gate.t()?)?, &x.matmul(&up.t()?)?)?; // (N, I)
            let within = shell_ranges(&self.widths).filter(|shell| shell.end <= h.dims()[1]);
            let part = |shell: std::ops::Range<usize>| {
                let down = down.narrow(1, shell.start, shell.len())?.t()?;
                h.narrow(1, shell.start, shell.len())?.matmul(&down) // (N, D)
            };
            within.map(part).collect()
        };
        let dense = shells([&self.gate_proj, &self.up_proj, &self.down_proj])?;
        let separate =
            self.separate.as_ref().map_or(Ok(Vec::new()), |part| shells(part.as_ref().into_array()))?;
        let smaller = dense.len() - 1;
        let mut outputs = running_sums(separate.iter().chain(&dense[separate.len()..smaller]))?;
        if let Some(compensation) = &self.compensation {
            for (e, output) in outputs.iter_mut().enumerate() {
                *output = output.broadcast_add(&compensation.get(e)?)?;
            }
        }
        outputs.extend(running_sums(dense.iter())?.pop());
        Ok(outputs)
    }
}

/// The sums of the first, of the first two, … of all parts.
fn running_sums<'a>(parts: impl Iterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
    let mut sums: Vec<Tensor> = Vec::new();
    for part in parts {
        let sum = sums.last().map_or_else(|| Ok(part.clone()), |sum| sum + part)?;
        sums.push(sum);
    }
    Ok(sums)
}

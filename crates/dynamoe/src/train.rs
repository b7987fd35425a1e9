//! The differentiable forward: every expert's output, or a soft mixture of them, from one full-width pass.

use candle_core::{Result, Tensor};

use crate::swiglu::{masked_swiglu, shell_ranges};

/// The weights of one FFN while it is trained.
#[derive(Debug, Clone)]
pub struct TrainableFfn {
    /// `(I, D)`
    pub gate_proj: Tensor,
    /// `(I, D)`
    pub up_proj: Tensor,
    /// `(D, I)`
    pub down_proj: Tensor,
    /// `(E-1, D)`
    pub compensation: Option<Tensor>,
    /// `H_e`, ending at `I`.
    pub widths: Vec<usize>,
}

impl TrainableFfn {
    /// `Σ_e p_e O_e(x)` for `x (N, D)`, where `reach (N, E)` holds `reach_s = Σ_{e ≥ s} p_e`: 1 in its first
    /// column, never increasing along a row.
    ///
    /// # Errors
    /// candle's.
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
        let (gate, up) = (linear(x, &self.gate_proj)?, linear(x, &self.up_proj)?); // (N, I)
        let h = masked_swiglu(&gate, &up, reach, &self.widths)?;
        let y = linear(&h, &self.down_proj)?; // (N, D)
        let narrower = self.widths.len() - 1;
        match &self.compensation {
            Some(compensation) if narrower > 0 => {
                // p_e = reach_e - reach_{e+1}
                let p = (reach.narrow(1, 0, narrower)? - reach.narrow(1, 1, narrower)?)?; // (N, E-1)
                y + p.matmul(compensation)?
            }
            _ => Ok(y),
        }
    }

    /// `O_e(x)` of every expert, narrowest first, each `(N, D)`, compensation included. Gradients flow through
    /// all of them; detach where they only label.
    ///
    /// # Errors
    /// candle's.
    pub fn expert_outputs(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let gate = x.matmul(&self.gate_proj.t()?)?; // (N, I)
        let h = (gate.silu()? * x.matmul(&self.up_proj.t()?)?)?;
        let mut outputs: Vec<Tensor> = Vec::with_capacity(self.widths.len());
        for shell in shell_ranges(&self.widths) {
            let down = self.down_proj.narrow(1, shell.start, shell.len())?.t()?;
            let part = h.narrow(1, shell.start, shell.len())?.matmul(&down)?; // (N, D)
            outputs.push(match outputs.last() {
                Some(narrower) => (narrower + part)?,
                None => part,
            });
        }
        if let Some(compensation) = &self.compensation {
            let narrower = outputs.len() - 1;
            for (e, output) in outputs[..narrower].iter_mut().enumerate() {
                *output = output.broadcast_add(&compensation.get(e)?)?;
            }
        }
        Ok(outputs)
    }
}

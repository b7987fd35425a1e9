//! Dense FFNs on dynamoe's CPU kernels: a dense model then runs on the same kernels as a DynaMoE model at full width.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::Activation as CandleActivation;
use dynamoe::{NestedExperts, Projections, ShellExperts};
use mistralrs_core::{
    layers::Activation,
    plugin::{AnyMoeTrainableLayer, MlpLayer},
};

use crate::{
    experts::{CpuKernels, EngineExperts, FastExperts},
    projection::{Projection, Slot, fused_glu},
};

/// Puts MLPs of three projections on an FFN of one expert, which CPU kernels can run in one pass. Other MLPs stay as
/// they are.
///
/// # Errors
/// An activation that candle does not know.
pub(crate) fn swap_dense(mlps: Vec<&mut Box<dyn MlpLayer>>) -> anyhow::Result<CpuKernels> {
    let mut kernels = Vec::with_capacity(mlps.len());
    for mlp in mlps {
        let params = mlp.get_params().to_vec();
        let activation = mlp.hidden_act();
        let slots: Vec<Slot> = mlp.get_isq_layers().into_iter().map(|slot| Arc::clone(slot)).collect();
        let (Ok([gate, up, down]), &[_, width, ..]) = (<[Slot; 3]>::try_from(slots), params.as_slice())
        else {
            kernels.push(None);
            continue;
        };
        let shell =
            Projections { gate_proj: Projection(gate), up_proj: Projection(up), down_proj: Projection(down) };
        let ffn = DenseFfn::new(shell, width, activation)?;
        kernels.push(Some(Arc::clone(&ffn.experts.fast)));
        *mlp = Box::new(DenseFfn { params, ..ffn });
    }
    Ok(CpuKernels(kernels))
}

/// A dense FFN as the only expert.
#[derive(Clone)]
struct DenseFfn {
    experts: EngineExperts,
    params: Vec<usize>,
    activation: Activation,
}

impl DenseFfn {
    fn new(shell: Projections<Projection>, width: usize, activation: Activation) -> anyhow::Result<Self> {
        let function: CandleActivation = activation.try_into()?;
        let experts = EngineExperts {
            shells: ShellExperts::new(vec![shell], function, &[width])?.with_glu(fused_glu),
            fast: Arc::new(FastExperts::new(function, &[width])),
            #[cfg(feature = "cuda")]
            cuda: Arc::default(),
        };
        Ok(Self { experts, params: Vec::new(), activation })
    }
}

impl MlpLayer for DenseFfn {
    /// `xs (batch, sequence, D)`.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let x = xs.reshape(((), xs.dim(D::Minus1)?))?; // (T, D)
        self.experts.forward(&x, &[x.dim(0)?])?.reshape(xs.shape())
    }

    fn get_isq_layers(&mut self) -> Vec<&mut Slot> {
        self.experts.slots()
    }

    fn clone(&self) -> Box<dyn MlpLayer> {
        Box::new(Clone::clone(self))
    }

    fn get_params(&self) -> &[usize] {
        &self.params
    }

    fn hidden_act(&self) -> Activation {
        self.activation
    }

    /// gate, up, down
    fn new_added_delta(&self, deltas: Vec<Option<Tensor>>) -> Result<Box<dyn MlpLayer>> {
        let mut ffn = Clone::clone(self);
        // the kernels hold the weights as they were
        ffn.experts.fast = Arc::new(self.experts.fast.empty());
        for (slot, delta) in ffn.experts.slots().into_iter().zip(&deltas) {
            if let Some(delta) = delta {
                *slot = slot.add_delta_w(delta)?;
            }
        }
        Ok(Box::new(ffn))
    }

    fn dtype_device(&self) -> (DType, Device) {
        self.experts.dtype_device()
    }
}

impl AnyMoeTrainableLayer for DenseFfn {}

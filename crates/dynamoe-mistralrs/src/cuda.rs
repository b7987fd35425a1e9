//! The engine's projections on the CUDA kernels of `dynamoe`, without a wait for the routes of a layer.
//!
//! This compiles and has not run on a GPU yet.

use std::sync::{Arc, RwLock};

use candle_core::{Result, quantized::GgmlDType};
use dynamoe::{CudaSegment, CudaSegments, CudaWeight};
use mistralrs_quant::{GgufMatMul, QuantMethod, QuantMethodConfig};

use crate::{
    engine_blocks::EngineBlocks,
    locks::{read, write},
    projection::Slot,
};

/// Where the matrices of a layer's shells lie on a CUDA device, while the kernels know all of them.
#[derive(Default)]
pub(crate) struct CudaExperts(RwLock<Option<CudaSegments>>);

impl CudaExperts {
    /// Takes note of the shells in `slots` (gate, up and down projection of each, narrowest expert's first, `experts` of
    /// them and then the smaller experts' separate ones), which hold the same weights afterwards, in the memory
    /// that is used here. Returns whether there are kernels for them.
    pub fn try_build(&self, slots: Vec<&mut Slot>, experts: usize) -> Result<bool> {
        let weights = slots.into_iter().map(weight).collect::<Result<Vec<_>>>()?;
        let weights: Option<Vec<_>> = weights.into_iter().collect();
        let segment = |w: &[CudaWeight]| CudaSegment {
            gate_proj: w[0].clone(),
            up_proj: w[1].clone(),
            down_proj: w[2].clone(),
        };
        let segments = weights.map(|weights| {
            let mut dense: Vec<_> = weights.chunks_exact(3).map(segment).collect();
            let separate = dense.split_off(experts.min(dense.len()));
            CudaSegments { dense, separate }
        });
        let mut of_layer = write(&self.0);
        *of_layer = segments;
        Ok(of_layer.is_some())
    }

    /// Forgets them, since the engine is about to change the shells.
    pub fn release(&self) {
        *write(&self.0) = None;
    }

    pub fn is_built(&self) -> bool {
        read(&self.0).is_some()
    }

    pub fn get(&self) -> Option<CudaSegments> {
        read(&self.0).clone()
    }
}

/// The matrix in `slot`, if it is on a CUDA device and of a type that the kernels know.
///
/// An engine's quantized matrix is private to it, but it can be serialized: what is read from that takes its place.
fn weight(slot: &mut Slot) -> Result<Option<CudaWeight>> {
    if let Some((weight, bias)) = slot.unquant_weight_bias() {
        let usable = weight.device().is_cuda() && bias.is_none();
        return Ok(usable.then_some(CudaWeight::Float(weight)));
    }
    // the first also waits for a projection that is being quantized
    if !slot.isq_serde_supported() || !slot.dtype_and_device().1.is_cuda() {
        return Ok(None);
    }
    let device = slot.dtype_and_device().1;
    // a matrix that fits no blocks is kept in f32, which the engine does not serialize
    let Ok(serialized) = slot.serialize() else { return Ok(None) };
    match EngineBlocks::read(&serialized, &device)? {
        Some(EngineBlocks { weight, bias: None })
            if matches!(weight.dtype(), GgmlDType::Q4K | GgmlDType::Q8_0) =>
        {
            let weight = Arc::new(weight);
            let config = QuantMethodConfig::Gguf { q_weight: Arc::clone(&weight), b: None };
            *slot = Arc::new(GgufMatMul::new(config)?);
            Ok(Some(CudaWeight::Quantized(weight)))
        }
        _ => Ok(None),
    }
}

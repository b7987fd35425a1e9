//! Reads a layer's FFN: shells as slices of the dense matrices and of the separate ones, router and compensation in full
//! precision.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_nn::{Activation, Linear};
use dynamoe::{DynaMoeConfig, DynaMoeFfn, Projections, Router, ShellExperts, tensors};
use mistralrs_quant::{
    DummyLayer, IsqType, QuantMethod, QuantMethodConfig, Shard, ShardedVarBuilder, UnquantLinear,
    apply_immediate_isq, immediate_isq_match,
};

use crate::{
    checked::check_finite,
    experts::{EngineExperts, FastExperts},
    projection::{Projection, fused_glu},
};

/// Where the FFN of one layer is read from.
pub struct LayerWeights {
    /// The layer's FFN, `model.layers.N.mlp`, in the type and on the device that its matrices are read to.
    pub vb: ShardedVarBuilder,
    /// Where the layer runs.
    pub device: Device,
}

impl LayerWeights {
    /// Reads the layer's FFN.
    pub(crate) fn read(
        &self,
        config: &DynaMoeConfig,
        hidden_size: usize,
    ) -> Result<DynaMoeFfn<EngineExperts>> {
        let activation = Activation::from(config.hidden_act);
        let shells = self.shells(&config.expert_widths, hidden_size)?;
        let separate = Self { vb: self.vb.pp("own"), device: self.device.clone() };
        let separate = separate.shells(&config.expert_widths[..config.separate_shells], hidden_size)?;
        let experts = EngineExperts {
            shells: ShellExperts::new(shells, activation, &config.expert_widths)?
                .with_separate(separate)?
                .with_glu(fused_glu),
            fast: Arc::new(FastExperts::new(activation, &config.expert_widths)),
            #[cfg(feature = "cuda")]
            cuda: Arc::default(),
        };
        let exact = self.vb.clone().set_dtype(DType::F32).set_device(self.device.clone());
        let mut get = |name: &str, shape: &[usize]| {
            let tensor = exact.get(shape, name)?;
            check_finite(&format!("{}.{name}", exact.prefix()), &tensor)?;
            Ok(tensor)
        };
        let router = Router::load(config, hidden_size, &mut get)?;
        let compensation = tensors::read_compensation(config, hidden_size, &mut get)?;
        Ok(DynaMoeFfn::new(experts, router, compensation, config.sensitivity)?)
    }

    /// The matrices here in shells that end at `ends`.
    fn shells(&self, ends: &[usize], hidden_size: usize) -> Result<Vec<Projections<Projection>>> {
        let width = ends.last().copied().unwrap_or(0);
        let starts = [0].into_iter().chain(ends.iter().copied());
        let shell = |(shell, (start, &end))| self.shell(shell, start..end, [width, hidden_size]);
        starts.zip(ends).enumerate().map(shell).collect()
    }

    /// The neurons `neurons` of `width`, as three projections of their own.
    fn shell(
        &self,
        shell: usize,
        neurons: std::ops::Range<usize>,
        [width, hidden_size]: [usize; 2],
    ) -> Result<Projections<Projection>> {
        let (offset, len) = (neurons.start, neurons.len());
        let projection = |matrix: &str| -> Result<Projection> {
            // neurons are rows of gate and up, columns of down
            let (dim, shape, columns) = match matrix {
                "down_proj" => (1, (hidden_size, width), len),
                _ => (0, (width, hidden_size), hidden_size),
            };
            let from = self.vb.pp(matrix);
            if !from.contains_tensor("weight") {
                // a UQFF file will fill it
                return Ok(Projection(Arc::new(DummyLayer::new(QuantMethodConfig::Dummy)?)));
            }
            let to = self.vb.pp("shells").pp(shell).pp(matrix);
            let quantization = immediate_isq_match(&to);
            // what is quantized while loading is read by the host
            let from = if quantization.is_some() { from.set_device(Device::Cpu) } else { from };
            if let Some(fallback) = quantization.and_then(|isq| fallback(isq.ty, columns)) {
                tracing::warn!("{}: {columns} columns do not fit {fallback}", to.prefix());
            }
            let slice = Shard::Offset { dim, offset, len };
            let weight = from.get_with_hints(shape, "weight", slice)?.force_contiguous()?;
            check_finite(&format!("{}.weight", from.prefix()), &weight)?;
            let linear = UnquantLinear::new(QuantMethodConfig::Unquantized(Linear::new(weight, None)))?;
            Ok(Projection(apply_immediate_isq(Arc::new(linear), to)?))
        };
        Ok(Projections {
            gate_proj: projection("gate_proj")?,
            up_proj: projection("up_proj")?,
            down_proj: projection("down_proj")?,
        })
    }
}

/// What the engine uses instead of a K-quant, in words, for rows of a length that K-quants cannot hold.
fn fallback(isq: IsqType, columns: usize) -> Option<String> {
    let instead = match isq {
        IsqType::Q2K | IsqType::Q3K => "Q4_0",
        IsqType::Q4K => "Q4_1",
        IsqType::Q5K => "Q5_0",
        IsqType::Q6K => "Q5_1",
        IsqType::Q8K => "Q8_1",
        _ => return None,
    };
    match columns {
        c if c.is_multiple_of(256) => None,
        c if c.is_multiple_of(32) => Some(format!("{isq:?} (a multiple of 256), so {instead} is used")),
        _ => Some(format!("{isq:?} (a multiple of 256), nor {instead} (of 32), so f32 is used")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_k_quant_that_does_not_fit_says_what_is_used() {
        assert_eq!(fallback(IsqType::Q4K, 512), None);
        assert_eq!(fallback(IsqType::Q8_0, 33), None);
        assert!(fallback(IsqType::Q4K, 160).unwrap().ends_with("so Q4_1 is used"));
        assert!(fallback(IsqType::Q6K, 161).unwrap().ends_with("so f32 is used"));
    }
}

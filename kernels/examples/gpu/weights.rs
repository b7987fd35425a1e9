//! Random layers on the device, and the same numbers on the host.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use dynamoe_kernels::cuda::{Routed, Router, Segment, Weight};
use dynamoe_kernels::plan::Block;
use dynamoe_kernels::reference::dequantize;

/// What the weights are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Float(DType),
    Blocks(GgmlDType),
}

impl Format {
    pub fn name(self) -> String {
        match self {
            Self::Float(dtype) => format!("{dtype:?}"),
            Self::Blocks(dtype) => format!("{dtype:?}"),
        }
    }

    /// Bytes of `weights` weights.
    pub fn bytes(self, weights: usize) -> usize {
        match self {
            Self::Float(dtype) => weights * dtype.size_in_bytes(),
            Self::Blocks(dtype) => weights / dtype.block_size() * dtype.type_size(),
        }
    }

    /// The type of activations beside such weights.
    pub fn activations(self) -> DType {
        match self {
            Self::Float(dtype) => dtype,
            Self::Blocks(_) => DType::BF16,
        }
    }
}

pub struct Matrix {
    pub weight: Weight,
    /// The numbers that the weight stands for; empty for [`Matrix::unseen`].
    pub values: Vec<f64>,
}

impl Matrix {
    pub fn random(shape: (usize, usize), scale: f64, format: Format, device: &Device) -> Result<Self> {
        let values = Tensor::rand(-scale, scale, shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        match format {
            Format::Float(dtype) => {
                let rounded = values.to_dtype(dtype)?;
                Ok(Self { values: to_f64(&rounded)?, weight: Weight::Float(rounded.to_device(device)?) })
            }
            Format::Blocks(dtype) => {
                let block = if dtype == GgmlDType::Q4K { Block::Q4K } else { Block::Q8_0 };
                let blocks = exact(block, QTensor::quantize(&values, dtype)?.data()?.into_owned());
                let values = dequantize(block, &blocks);
                let storage = QStorage::from_data(blocks.into(), device, dtype)?;
                Ok(Self { values, weight: Weight::Quantized(Arc::new(QTensor::new(storage, shape)?)) })
            }
        }
    }

    /// Made on the device, for times only.
    pub fn unseen(shape: (usize, usize), scale: f64, format: Format, device: &Device) -> Result<Self> {
        match format {
            Format::Float(dtype) => {
                let weight = Tensor::rand(-scale as f32, scale as f32, shape, device)?.to_dtype(dtype)?;
                Ok(Self { weight: Weight::Float(weight), values: vec![] })
            }
            Format::Blocks(_) => Ok(Self { values: vec![], ..Self::random(shape, scale, format, device)? }),
        }
    }
}

/// Rounds the scales of Q4K to multiples of 2⁻²⁰, so that a weight is exact in f32 in whatever order it is computed.
fn exact(block: Block, mut bytes: Vec<u8>) -> Vec<u8> {
    if block == Block::Q4K {
        for block in bytes.chunks_mut(block.bytes()) {
            for at in [0, 2] {
                let scale = half::f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
                let rounded = (scale * f64::from(1 << 20)).round() / f64::from(1 << 20);
                block[at..at + 2].copy_from_slice(&half::f16::from_f64(rounded).to_le_bytes());
            }
        }
    }
    bytes
}

pub fn to_f64(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

/// gate_proj, up_proj, down_proj.
pub fn segment(matrices: &[Matrix; 3]) -> Segment {
    let [gate_proj, up_proj, down_proj] = [0, 1, 2].map(|m: usize| matrices[m].weight.clone());
    Segment { gate_proj, up_proj, down_proj }
}

pub struct RouterWeights {
    pub fc1: Tensor,
    pub fc1_bias: Tensor,
    pub fc2: Tensor,
    pub fc2_bias: Tensor,
}

impl RouterWeights {
    pub fn random(d: usize, r: usize, experts: usize, device: &Device) -> Result<Self> {
        let uniform = |shape: &[usize], scale: f32| Tensor::rand(-scale, scale, shape, device);
        Ok(Self {
            fc1: uniform(&[r, d], 2.0 / (d as f32).sqrt())?,
            fc1_bias: uniform(&[r], 0.5)?,
            fc2: uniform(&[experts - 1, r], 2.0 / (r as f32).sqrt())?,
            fc2_bias: uniform(&[experts - 1], 0.5)?,
        })
    }

    pub fn view(&self) -> Router<'_> {
        Router { fc1: &self.fc1, fc1_bias: &self.fc1_bias, fc2: &self.fc2, fc2_bias: &self.fc2_bias }
    }
}

/// Tokens that go where `experts` says.
pub fn routed(experts: &[u32], widths: &[usize], device: &Device) -> Result<Routed> {
    let of = |e: &u32| widths[*e as usize] as u32;
    Ok(Routed {
        experts: Tensor::new(experts, device)?,
        widths: Tensor::new(experts.iter().map(of).collect::<Vec<_>>(), device)?,
    })
}

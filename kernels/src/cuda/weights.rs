//! Weights of the FFN on the device.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Result, Tensor, bail};

use super::operand::{Rows, rows};
use crate::MAX_SEGMENTS;
use crate::args::{self, Serves};
use crate::plan::{Block, QUANTIZED_COLUMNS};

/// A matrix of weights on the device.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32, f16 or bf16, as the activations.
    Float(Tensor),
    /// Q4K or Q8_0.
    Quantized(Arc<QTensor>),
}

impl Weight {
    fn dims(&self) -> Result<[usize; 2]> {
        let (rows, columns) = match self {
            Self::Float(tensor) => tensor.dims2()?,
            Self::Quantized(tensor) => tensor.shape().dims2()?,
        };
        Ok([rows, columns])
    }

    /// The format of quantized weights, none for floats.
    fn block(&self) -> Result<Option<Block>> {
        match self {
            Self::Float(_) => Ok(None),
            Self::Quantized(tensor) => match tensor.dtype() {
                GgmlDType::Q4K => Ok(Some(Block::Q4K)),
                GgmlDType::Q8_0 => Ok(Some(Block::Q8_0)),
                other => bail!("dispatch: expected weights in Q4K or Q8_0, found {other:?}"),
            },
        }
    }

    fn rows(&self, name: &str, dtype: DType, shape: [usize; 2]) -> Result<Rows> {
        match self {
            Self::Float(tensor) => rows(tensor, name, dtype, shape),
            Self::Quantized(tensor) => {
                let block = self.block()?.map_or(1, Block::weights);
                if self.dims()? != shape {
                    bail!("{name}: expected {shape:?}, found {:?}", tensor.shape());
                }
                Ok(Rows { address: tensor.device_ptr()? as u64, stride: (shape[1] / block) as u32 })
            }
        }
    }
}

/// A run of neurons in matrices of its own: the whole FFN, or one shell.
#[derive(Debug, Clone)]
pub struct Segment {
    /// `(neurons, D)`
    pub gate_proj: Weight,
    /// `(neurons, D)`
    pub up_proj: Weight,
    /// `(D, neurons)`
    pub down_proj: Weight,
}

/// The weights of a layer.
#[derive(Debug, Clone)]
pub struct Segments {
    /// The dense FFN's, from neuron 0 on.
    pub dense: Vec<Segment>,
    /// What tokens below full width have in place of the first neurons; empty if nothing. May end inside a dense segment.
    pub separate: Vec<Segment>,
}

impl Segments {
    fn all(&self) -> impl Iterator<Item = &Segment> {
        self.dense.iter().chain(&self.separate)
    }
}

/// Formats of gate_proj and up_proj, and of down_proj, the same in all segments; none for floats.
pub(super) fn blocks(segments: &Segments) -> Result<Option<[Block; 2]>> {
    let of = |s: &Segment| {
        Ok::<_, candle_core::Error>([s.gate_proj.block()?, s.up_proj.block()?, s.down_proj.block()?])
    };
    let Some(first) = segments.dense.first() else { bail!("dispatch: expected segments, found none") };
    let formats @ [gate, up, down] = of(first)?;
    for segment in segments.all() {
        if of(segment)? != formats || gate != up || gate.is_some() != down.is_some() {
            bail!(
                "dispatch: expected all segments in the same formats, found {formats:?} and {:?}",
                of(segment)?
            );
        }
    }
    Ok(gate.zip(down).map(|(gate, down)| [gate, down]))
}

/// The reason why [`super::forward`] cannot run rows of type `dtype` through these segments, or none if it can. It depends on
/// shapes and types only.
pub fn unsupported(dtype: DType, segments: &Segments) -> Option<String> {
    let why = || -> Result<Option<String>> {
        // one more if the end of separate weights cuts a dense segment
        if segments.all().count() >= MAX_SEGMENTS {
            return Ok(Some(format!("{MAX_SEGMENTS} segments or more")));
        }
        let blocks = blocks(segments)?;
        let multiple = match (blocks, dtype) {
            (Some(_), DType::F32 | DType::F16 | DType::BF16) => QUANTIZED_COLUMNS,
            (None, DType::F32) => 4,
            (None, DType::F16 | DType::BF16) => 8,
            _ => return Ok(Some(format!("activations in {dtype:?}"))),
        };
        for segment in segments.all() {
            let [neurons, d] = segment.gate_proj.dims()?;
            if !neurons.is_multiple_of(multiple) || !d.is_multiple_of(multiple) {
                return Ok(Some(format!("({neurons}, {d}) is not in multiples of {multiple}")));
            }
        }
        Ok(None)
    };
    why().unwrap_or_else(|error| Some(error.to_string()))
}

/// Segments as the kernels see them, one behind the other from neuron 0 on.
pub(super) fn addresses(segments: &[Segment], dtype: DType, d: usize) -> Result<Vec<args::Segment>> {
    let mut start = 0;
    let of = |segment: &Segment| {
        let [neurons, _] = segment.gate_proj.dims()?;
        let gate = segment.gate_proj.rows("dispatch: gate_proj", dtype, [neurons, d])?;
        let up = segment.up_proj.rows("dispatch: up_proj", dtype, [neurons, d])?;
        let down = segment.down_proj.rows("dispatch: down_proj", dtype, [d, neurons])?;
        let end = start + neurons as u32;
        Ok(args::Segment {
            gate: gate.address,
            up: up.address,
            down: down.address,
            start: std::mem::replace(&mut start, end),
            end,
            gate_stride: gate.stride,
            up_stride: up.stride,
            down_stride: down.stride,
            serves: Serves::AllTokens,
        })
    };
    segments.iter().map(of).collect()
}

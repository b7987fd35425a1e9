//! Launches of the FFN.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::{bf16, f16};

use super::launch::launch;
use super::operand::{Rows, Scratch, contiguous, device_of, float_of, rows};
use super::route::Routed;
use crate::args::{self, FfnArgs, QuantizeArgs, Quantized, SortArgs};
use crate::plan::{self, Block, Float, Many, QUANTIZED_COLUMNS};
use crate::{MAX_EXPERTS, MAX_SEGMENTS};

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

/// Formats of gate_proj and up_proj, and of down_proj, the same in all segments; none for floats.
fn blocks(segments: &[Segment]) -> Result<Option<[Block; 2]>> {
    let of = |s: &Segment| {
        Ok::<_, candle_core::Error>([s.gate_proj.block()?, s.up_proj.block()?, s.down_proj.block()?])
    };
    let Some(first) = segments.first() else { bail!("dispatch: expected segments, found none") };
    let formats @ [gate, up, down] = of(first)?;
    for segment in segments {
        if of(segment)? != formats || gate != up || gate.is_some() != down.is_some() {
            bail!(
                "dispatch: expected all segments in the same formats, found {formats:?} and {:?}",
                of(segment)?
            );
        }
    }
    Ok(gate.zip(down).map(|(gate, down)| [gate, down]))
}

/// The reason why [`forward`] cannot run rows of type `dtype` through these segments, or none if it can. It depends on
/// shapes and types only.
pub fn unsupported(dtype: DType, segments: &[Segment]) -> Option<String> {
    let why = || -> Result<Option<String>> {
        if segments.len() > MAX_SEGMENTS {
            return Ok(Some(format!("more than {MAX_SEGMENTS} segments")));
        }
        let blocks = blocks(segments)?;
        let multiple = match (blocks, dtype) {
            (Some(_), DType::F32 | DType::F16 | DType::BF16) => QUANTIZED_COLUMNS,
            (None, DType::F32) => 4,
            (None, DType::F16 | DType::BF16) => 8,
            _ => return Ok(Some(format!("activations in {dtype:?}"))),
        };
        for segment in segments {
            let [neurons, d] = segment.gate_proj.dims()?;
            if !neurons.is_multiple_of(multiple) || !d.is_multiple_of(multiple) {
                return Ok(Some(format!("({neurons}, {d}) is not in multiples of {multiple}")));
            }
        }
        Ok(None)
    };
    why().unwrap_or_else(|error| Some(error.to_string()))
}

/// The FFN: `x (T, D)` → `(T, D)`, each token at the width of its route. `compensation (E-1, D)`, in f32, belongs to the
/// experts without the largest.
///
/// # Errors
/// The reason that [`unsupported`] gives; shapes, types and strides that do not fit.
pub fn forward(
    x: &Tensor,
    segments: &[Segment],
    compensation: Option<&Tensor>,
    routed: &Routed,
) -> Result<Tensor> {
    forward_as(x, segments, compensation, routed, None)
}

/// [`forward`] with kernels that the caller chooses, for measurements. The device must be able to run them.
///
/// # Errors
/// [`forward`]'s; [`Many::Few`] with more than [`plan::FEW_TOKENS`].
pub fn forward_as(
    x: &Tensor,
    segments: &[Segment],
    compensation: Option<&Tensor>,
    routed: &Routed,
    many: Option<Many>,
) -> Result<Tensor> {
    let (tokens, d) = x.dims2()?;
    if let Some(why) = unsupported(x.dtype(), segments) {
        bail!("dispatch: the CUDA kernels do not do this: {why}");
    }
    if many == Some(Many::Few) && tokens > plan::FEW_TOKENS {
        bail!("dispatch: expected at most {} tokens for these kernels, found {tokens}", plan::FEW_TOKENS);
    }
    let device = device_of(x, "dispatch: x")?;
    let call = Call { device, float: float_of(x, "dispatch: x")?, tokens, blocks: blocks(segments)?, many };
    let args = call.args(x, d, segments, compensation, routed)?;
    match call.float {
        Float::F32 => call.run::<f32>(args),
        Float::F16 => call.run::<f16>(args),
        Float::Bf16 => call.run::<bf16>(args),
    }
}

struct Call {
    device: CudaDevice,
    float: Float,
    tokens: usize,
    blocks: Option<[Block; 2]>,
    many: Option<Many>,
}

impl Call {
    fn args(
        &self,
        x: &Tensor,
        d: usize,
        segments: &[Segment],
        compensation: Option<&Tensor>,
        routed: &Routed,
    ) -> Result<FfnArgs> {
        let of_x = rows(x, "dispatch: x", x.dtype(), [self.tokens, d])?;
        // without compensation no expert is special
        let (expert_count, compensation) = match compensation {
            None => (MAX_EXPERTS, 0),
            Some(c) => (c.dim(0)? + 1, contiguous(c, "dispatch: compensation", DType::F32, &[c.dim(0)?, d])?),
        };
        let mut args = FfnArgs {
            x: of_x.address,
            x_stride: of_x.stride,
            compensation,
            experts: contiguous(&routed.experts, "dispatch: experts", DType::U32, &[self.tokens])?,
            widths: contiguous(&routed.widths, "dispatch: widths", DType::U32, &[self.tokens])?,
            tokens: self.tokens as u32,
            hidden_size: d as u32,
            expert_count: expert_count as u32,
            segment_count: segments.len() as u32,
            ..FfnArgs::default()
        };
        let mut start = 0;
        for (to, segment) in args.segments.iter_mut().zip(segments) {
            let [neurons, _] = segment.gate_proj.dims()?;
            let gate = segment.gate_proj.rows("dispatch: gate_proj", x.dtype(), [neurons, d])?;
            let up = segment.up_proj.rows("dispatch: up_proj", x.dtype(), [neurons, d])?;
            let down = segment.down_proj.rows("dispatch: down_proj", x.dtype(), [d, neurons])?;
            *to = args::Segment {
                gate: gate.address,
                up: up.address,
                down: down.address,
                start,
                end: start + neurons as u32,
                gate_stride: gate.stride,
                up_stride: up.stride,
                down_stride: down.stride,
                reserved: 0,
            };
            start += neurons as u32;
        }
        args.intermediate_size = start;
        Ok(args)
    }

    fn run<T>(&self, mut args: FfnArgs) -> Result<Tensor>
    where
        T: candle_core::cuda_backend::CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr,
    {
        let (d, i) = (args.hidden_size as usize, args.intermediate_size as usize);
        let mut y = Scratch::<T>::new(&self.device, self.tokens * d)?;
        args.y = y.address();
        // tensor cores have no f32, so f32 decodes in groups instead of prefill
        let decodes = self.tokens <= plan::DECODE_TOKENS || self.float == Float::F32;
        if let (Some(blocks), true) = (self.blocks, decodes) {
            self.decode_quantized(blocks, &mut args)?;
        } else {
            let mut h = Scratch::<T>::new(&self.device, self.tokens * i)?;
            args.h = h.address();
            if decodes {
                self.launch_all(&plan::decode(self.float, self.tokens, d, i), &args)?;
            } else {
                self.many(&mut args)?;
            }
        }
        Ok(y.into_tensor(&self.device, (self.tokens, d)))
    }

    fn launch_all(&self, launches: &[plan::Launch], args: &FfnArgs) -> Result<()> {
        for one in launches {
            // SAFETY: `args` checked the addresses; scratch is freed behind the launches
            unsafe { launch(&self.device, one, args) }?;
        }
        Ok(())
    }

    fn many(&self, args: &mut FfnArgs) -> Result<()> {
        let (tokens, d) = (self.tokens, args.hidden_size as usize);
        let segments = &args.segments[..args.segment_count as usize];
        let lengths: Vec<usize> = segments.iter().map(|s| (s.end - s.start) as usize).collect();
        if let Some(blocks) = self.blocks {
            return self.sorted(&plan::prefill_quantized(blocks, self.float, tokens, d, &lengths), args);
        }
        let (major, _) = self.device.cuda_stream().context().compute_capability().w()?;
        match self.many.unwrap_or_else(|| plan::many(major, tokens, d, &lengths)) {
            Many::Tiles(tiles) => self.sorted(&plan::prefill(self.float, tiles, tokens, d, &lengths), args),
            Many::Few => {
                let splits = plan::few_splits(d);
                let mut partial = Scratch::<f32>::new(&self.device, splits * tokens * d)?;
                (args.partial, args.splits) = (partial.address(), splits as u32);
                self.launch_all(&plan::few(self.float, tokens, d, &lengths), args)
            }
        }
    }

    /// Launches that expect tokens in order of width.
    fn sorted(&self, launches: &[plan::Launch], args: &mut FfnArgs) -> Result<()> {
        let mut order = Scratch::<u32>::new(&self.device, self.tokens)?;
        args.order = order.address();
        let sort = SortArgs {
            experts: args.experts,
            order: args.order,
            tokens: args.tokens,
            expert_count: MAX_EXPERTS as u32,
        };
        // SAFETY: as many experts and places as tokens
        unsafe { launch(&self.device, &plan::sort(), &sort) }?;
        self.launch_all(launches, args)
    }

    fn decode_quantized(&self, blocks: [Block; 2], args: &mut FfnArgs) -> Result<()> {
        let (d, i) = (args.hidden_size as usize, args.intermediate_size as usize);
        let mut of_x = QuantizedScratch::new(&self.device, self.tokens, d)?;
        let mut of_h = QuantizedScratch::new(&self.device, self.tokens, i)?;
        let mut h = Scratch::<f32>::new(&self.device, self.tokens * i)?;
        (args.xq, args.hq, args.h) = (of_x.args(), of_h.args(), h.address());
        let of = |x, out, columns: usize, x_stride, widths| QuantizeArgs {
            x,
            out,
            widths,
            tokens: args.tokens,
            columns: columns as u32,
            x_stride,
            reserved: 0,
        };
        let [gate_up, down] = plan::decode_quantized(blocks, self.float, self.tokens, d, i);
        let quantize = plan::quantize(self.float, self.tokens, d);
        let requantize = plan::quantize(Float::F32, self.tokens, i);
        // SAFETY: `args` checked the addresses; scratch is freed behind the launches
        unsafe {
            launch(&self.device, &quantize, &of(args.x, args.xq, d, args.x_stride, 0))?;
            launch(&self.device, &gate_up, args)?;
            launch(&self.device, &requantize, &of(args.h, args.hq, i, i as u32, args.widths))?;
            launch(&self.device, &down, args)
        }
    }
}

/// Memory for quantized activations. Four numbers of 8 bits take a word.
struct QuantizedScratch {
    q: Scratch<u32>,
    scales: Scratch<f32>,
    sums: Scratch<f32>,
}

impl QuantizedScratch {
    fn new(device: &CudaDevice, tokens: usize, columns: usize) -> Result<Self> {
        Ok(Self {
            q: Scratch::new(device, tokens * columns / 4)?,
            scales: Scratch::new(device, tokens * columns / 32)?,
            sums: Scratch::new(device, tokens * columns / 16)?,
        })
    }

    fn args(&mut self) -> Quantized {
        Quantized { q: self.q.address(), scales: self.scales.address(), sums: self.sums.address() }
    }
}

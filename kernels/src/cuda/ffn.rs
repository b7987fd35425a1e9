//! Launches of the FFN.

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::{bf16, f16};

use super::launch::launch;
use super::operand::{Scratch, contiguous, device_of, float_of, rows};
use super::route::Routed;
use super::weights::{Segments, addresses, blocks, unsupported};
use crate::args::{FfnArgs, QuantizeArgs, Quantized, SortArgs};
use crate::plan::{self, Block, Float, Many};
use crate::{MAX_EXPERTS, segments};

/// The FFN: `x (T, D)` → `(T, D)`, each token at the width of its route, of which full width is the number of dense neurons.
/// `compensation (E-1, D)`, in f32, belongs to the experts without the largest.
///
/// # Errors
/// The reason that [`unsupported`] gives; shapes, types and strides that do not fit.
pub fn forward(
    x: &Tensor,
    segments: &Segments,
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
    segments: &Segments,
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
        segments: &Segments,
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
            ..FfnArgs::default()
        };
        let [dense, separate] =
            [&segments.dense, &segments.separate].map(|segments| addresses(segments, x.dtype(), d));
        let (dense, separate) = (dense?, separate?);
        args.intermediate_size = segments::size(&dense);
        args.separate_size = segments::size(&separate);
        if args.separate_size >= args.intermediate_size {
            let (separate, all) = (args.separate_size, args.intermediate_size);
            bail!("dispatch: expected separate weights for fewer than {all} neurons, found {separate}");
        }
        let units = self.blocks.map_or([self.float.into(); 2], |blocks| blocks.map(Into::into));
        let list = segments::list(&dense, &separate, units);
        args.segment_count = list.len() as u32;
        args.segments[..list.len()].copy_from_slice(&list);
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
                self.launch_all(&plan::decode(self.float, self.tokens, d, &lengths(&args)), &args)?;
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
        let lengths = lengths(args);
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
        let of_rows = QuantizeArgs { tokens: args.tokens, ..QuantizeArgs::default() };
        let input = QuantizeArgs {
            x: args.x,
            out: args.xq,
            columns: args.hidden_size,
            x_stride: args.x_stride,
            ..of_rows
        };
        let hidden = QuantizeArgs {
            x: args.h,
            out: args.hq,
            widths: args.widths,
            columns: args.intermediate_size,
            x_stride: args.intermediate_size,
            separate_size: args.separate_size,
            ..of_rows
        };
        let [gate_up, down] = plan::decode_quantized(blocks, self.float, self.tokens, d, &lengths(args));
        let quantize = plan::quantize(self.float, self.tokens, d);
        let requantize = plan::quantize(Float::F32, self.tokens, i);
        // SAFETY: `args` checked the addresses; scratch is freed behind the launches
        unsafe {
            launch(&self.device, &quantize, &input)?;
            launch(&self.device, &gate_up, args)?;
            launch(&self.device, &requantize, &hidden)?;
            launch(&self.device, &down, args)
        }
    }
}

/// The lengths of an argument's segments.
fn lengths(args: &FfnArgs) -> Vec<usize> {
    let segments = &args.segments[..args.segment_count as usize];
    segments.iter().map(|s| (s.end - s.start) as usize).collect()
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

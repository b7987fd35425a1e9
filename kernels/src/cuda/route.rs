//! Launches of the router.

use candle_core::{DType, Result, Tensor, bail};

use super::launch::launch;
use super::operand::{Scratch, contiguous, device_of, float_of, rows};
use crate::args::RouteArgs;
use crate::{MAX_EXPERTS, plan};

/// Most tokens for `route`, which reads the router's first layer once for every 8 tokens. More tokens use a library's GEMM.
const FUSED_TOKENS: usize = 32;

/// A router's weights, all f32.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    /// `(R, D)`
    pub fc1: &'a Tensor,
    /// `(R)`
    pub fc1_bias: &'a Tensor,
    /// `(E-1, R)`
    pub fc2: &'a Tensor,
    /// `(E-1)`
    pub fc2_bias: &'a Tensor,
}

/// The thresholds that logits are compared with.
#[derive(Debug, Clone, Copy)]
pub enum Thresholds<'a> {
    /// One for all tokens. A captured graph keeps the value.
    All(f32),
    /// One for each token, `(T)` in f32 on the device. A captured graph reads them again in every run.
    Each(&'a Tensor),
}

/// Where tokens go, on the device.
#[derive(Debug, Clone)]
pub struct Routed {
    /// `(T)`, u32.
    pub experts: Tensor,
    /// `(T)`, u32: `H_e` of each token's expert.
    pub widths: Tensor,
}

/// The expert of every row of `x (T, D)`: the first whose logit reaches the threshold, else the largest. `expert_widths`
/// are `H_e`.
///
/// # Errors
/// Shapes, types and strides that do not fit; more than [`MAX_EXPERTS`] experts.
pub fn route(
    x: &Tensor,
    router: &Router<'_>,
    thresholds: Thresholds<'_>,
    expert_widths: &[usize],
) -> Result<Routed> {
    let device = device_of(x, "router: x")?;
    let (tokens, d) = x.dims2()?;
    let (r, experts) = (router.fc1.dim(0)?, expert_widths.len());
    if experts == 0 || experts > MAX_EXPERTS {
        bail!("router: expected 1 to {MAX_EXPERTS} experts, found {experts}");
    }
    let mut chosen = Scratch::<u32>::new(&device, tokens)?;
    let mut widths = Scratch::<u32>::new(&device, tokens)?;
    let narrower = experts - 1;
    let mut args = RouteArgs {
        fc1_bias: contiguous(router.fc1_bias, "router: fc1.bias", DType::F32, &[r])?,
        fc2: contiguous(router.fc2, "router: fc2.weight", DType::F32, &[narrower, r])?,
        fc2_bias: contiguous(router.fc2_bias, "router: fc2.bias", DType::F32, &[narrower])?,
        experts: chosen.address(),
        widths: widths.address(),
        tokens: tokens as u32,
        hidden_size: d as u32,
        router_size: r as u32,
        expert_count: experts as u32,
        ..RouteArgs::default()
    };
    match thresholds {
        Thresholds::All(threshold) => args.threshold = threshold,
        Thresholds::Each(each) => {
            args.thresholds = contiguous(each, "router: thresholds", DType::F32, &[tokens])?;
        }
    }
    for (to, &from) in args.expert_widths.iter_mut().zip(expert_widths) {
        *to = from as u32;
    }
    let float = float_of(x, "router: x")?;
    if tokens <= FUSED_TOKENS && d.is_multiple_of(16 / float.bytes()) {
        let x = rows(x, "router: x", x.dtype(), [tokens, d])?;
        let plan = plan::route(float, tokens, r);
        let mut hidden = Scratch::<f32>::new(&device, tokens * r)?;
        let mut blocks_done = Scratch::<u32>::zeros(&device, plan.grid[1] as usize)?;
        (args.x, args.x_stride) = (x.address, x.stride);
        args.fc1 = contiguous(router.fc1, "router: fc1.weight", DType::F32, &[r, d])?;
        (args.hidden, args.blocks_done) = (hidden.address(), blocks_done.address());
        // SAFETY: addresses of tensors and scratch that live until here, checked above
        unsafe { launch(&device, &plan, &args) }?;
    } else {
        let hidden = x.to_dtype(DType::F32)?.matmul(&router.fc1.t()?)?;
        args.hidden = contiguous(&hidden, "router: hidden", DType::F32, &[tokens, r])?;
        // SAFETY: as above
        unsafe { launch(&device, &plan::decide(tokens), &args) }?;
    }
    let tensor = |scratch: Scratch<u32>| scratch.into_tensor(&device, tokens);
    Ok(Routed { experts: tensor(chosen), widths: tensor(widths) })
}

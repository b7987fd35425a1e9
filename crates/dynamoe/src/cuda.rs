//! The layer on dynamoe-kernels: the device decides and dispatches, the host only launches.

use candle_core::{DType, Result, Tensor, bail};
use dynamoe_kernels::cuda::{self, Thresholds};

use crate::experts::NestedExperts;
use crate::router::{Router, logit};

/// `x (T, D)` → `(T, D)` and the expert of each token, `(T)` in u32 on the device. None where there is nothing to
/// decide on the device or nothing that the kernels know how to run; the caller then takes candle's operations.
///
/// `compensation (E-1, D)`; `sensitivities` holds one value for all tokens or one for each.
pub(crate) fn forward<X: NestedExperts>(
    experts: &X,
    router: &Router,
    compensation: Option<&Tensor>,
    x: &Tensor,
    sensitivities: &[f64],
) -> Result<Option<(Tensor, Tensor)>> {
    let Router::Mlp { fc1, fc2 } = router else { return Ok(None) };
    let (Some(fc1_bias), Some(fc2_bias)) = (fc1.bias(), fc2.bias()) else { return Ok(None) };
    let (tokens, widths) = (x.dim(0)?, experts.widths());
    if !x.device().is_cuda() || tokens == 0 || widths.len() < 2 || widths.len() > dynamoe_kernels::MAX_EXPERTS
    {
        return Ok(None);
    }
    let Some(segments) = experts.cuda_segments() else { return Ok(None) };
    if cuda::unsupported(x.dtype(), &segments).is_some() {
        return Ok(None);
    }
    let router = cuda::Router { fc1: fc1.weight(), fc1_bias, fc2: fc2.weight(), fc2_bias };
    let routed = match sensitivities {
        &[one] => cuda::route(x, &router, Thresholds::All(logit(one)), widths)?,
        each if each.len() == tokens => {
            let each: Vec<f32> = each.iter().map(|&s| logit(s)).collect();
            cuda::route(x, &router, Thresholds::Each(&Tensor::new(each, x.device())?), widths)?
        }
        other => bail!("router: expected 1 or {tokens} sensitivities, found {}", other.len()),
    };
    let compensation = compensation.map(|c| c.to_dtype(DType::F32)?.contiguous()).transpose()?;
    let y = cuda::forward(x, &segments, compensation.as_ref(), &routed)?;
    Ok(Some((y, routed.experts)))
}

//! Statistics of the FFNs' neurons on calibration text.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use dynamoe::train::glu::glu;

use crate::data::PaddedBatch;
use crate::machine::Machine;
use crate::progress::Progress;
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::linear;

/// The matrices of one dense FFN: gate `(I, D)`, up `(I, D)`, down `(D, I)`.
#[derive(Debug, Clone)]
pub struct DenseFfn {
    /// `(I, D)`
    pub gate_proj: Tensor,
    /// `(I, D)`
    pub up_proj: Tensor,
    /// `(D, I)`
    pub down_proj: Tensor,
}

/// Tokens whose activations are kept, at most.
pub const SAMPLE_TOKENS: usize = 16_384;
/// The activations take this part of the machine's memory at most.
const SAMPLE_SHARE: u64 = 24;
/// Bytes that they take at most where the machine's memory is not known.
const SAMPLE_BYTES: u64 = 1 << 30;

/// Bytes that the activations of all layers take at most. It follows from the memory that there is and not from what is
/// free, so that a machine finds the same order of neurons each time.
pub fn sample_limit() -> u64 {
    Machine::read().map_or(SAMPLE_BYTES, |machine| machine.limit / SAMPLE_SHARE)
}

/// The activations `h = act(gate) ∘ up` of one layer's neurons.
#[derive(Debug, Clone)]
pub struct Activations {
    /// `mean h_j` over all tokens: (I).
    pub mean: Vec<f32>,
    /// Those of evenly spread tokens: (S, I).
    pub sample: Tensor,
}

/// Measures every layer of a dense model; returns the statistics and the number of tokens they are from.
///
/// # Errors
/// No tokens.
pub fn measure(
    backbone: &Backbone,
    ffns: &[DenseFfn],
    batches: &[PaddedBatch],
) -> Result<(Vec<Activations>, usize)> {
    let (device, act) = (backbone.output_matrix().device(), backbone.config().hidden_act);
    let count: usize = batches.iter().map(PaddedBatch::scored).sum();
    ensure!(count > 0, "no tokens to calibrate on: expected at least one document of two tokens");
    let width: usize = ffns.iter().map(|ffn| ffn.gate_proj.dim(0)).sum::<candle_core::Result<usize>>()?;
    let room = (sample_limit() as usize / (4 * width.max(1))).clamp(1, SAMPLE_TOKENS);
    let mut every = (0..count).map(|token| token % count.div_ceil(room) == 0);
    let mut sums: Vec<Option<Tensor>> = vec![None; ffns.len()];
    let mut samples: Vec<Vec<Tensor>> = vec![Vec::new(); ffns.len()];
    let progress = Progress::new("reading activations", "tokens", count as u64, 0);
    for batch in batches {
        let (tokens, _, weights) = batch.tensors(device)?;
        let weights = weights.flatten_all()?.unsqueeze(0)?; // (1, N)
        let scored = (0u32..).zip(&batch.weights).filter(|(_, weight)| **weight > 0.0);
        let kept: Vec<u32> = scored.filter(|_| every.next() == Some(true)).map(|(row, _)| row).collect();
        let kept = Tensor::new(kept, device)?;
        backbone.forward(&tokens, &mut |layer, x| {
            let DenseFfn { gate_proj, up_proj, down_proj } = &ffns[layer];
            let h = glu(act, &linear(x, gate_proj)?, &linear(x, up_proj)?)?; // (N, I)
            let sum = weights.matmul(&h)?; // (1, I)
            sums[layer] = Some(match &sums[layer] {
                Some(before) => (before + sum)?,
                None => sum,
            });
            if kept.elem_count() > 0 {
                samples[layer].push(h.index_select(&kept, 0)?);
            }
            linear(&h, down_proj)
        })?;
        progress.add(batch.scored() as u64);
    }
    progress.finish();
    let layers = sums.into_iter().flatten().zip(samples).map(|(sum, sample)| {
        let mean = (sum.flatten_all()? / count as f64)?.to_vec1()?;
        Ok(Activations { mean, sample: Tensor::cat(&sample, 0)? })
    });
    Ok((layers.collect::<Result<_>>()?, count))
}

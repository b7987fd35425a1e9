//! Statistics of the FFNs' neurons on calibration text.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use crate::data::PaddedBatch;
use crate::model::Backbone;
use crate::model::ops::linear;

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

/// Means over tokens of the activations `h = silu(gate) ∘ up` of one layer's neurons, each (I).
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// `mean h_j`
    pub mean: Vec<f32>,
    /// `mean |h_j|`
    pub mean_abs: Vec<f32>,
}

/// Measures every layer of a dense model; returns the statistics and the number of tokens they are from.
/// `progress` hears how many batches are done.
///
/// # Errors
/// No tokens; candle's.
pub fn measure(
    backbone: &Backbone,
    ffns: &[DenseFfn],
    batches: &[PaddedBatch],
    progress: &mut dyn FnMut(usize),
) -> Result<(Vec<Activations>, usize)> {
    let mut sums: Vec<Option<(Tensor, Tensor)>> = vec![None; ffns.len()];
    let mut count = 0;
    for (index, batch) in batches.iter().enumerate() {
        let (tokens, _, weights) = batch.tensors(backbone.output_matrix().device())?;
        let weights = weights.flatten_all()?.unsqueeze(0)?; // (1, N)
        backbone.forward(&tokens, &mut |layer, x| {
            let DenseFfn { gate_proj, up_proj, down_proj } = &ffns[layer];
            let h = (linear(x, gate_proj)?.silu()? * linear(x, up_proj)?)?; // (N, I)
            let (mean, mean_abs) = (weights.matmul(&h)?, weights.matmul(&h.abs()?)?); // (1, I)
            sums[layer] = Some(match &sums[layer] {
                Some(sum) => ((&sum.0 + mean)?, (&sum.1 + mean_abs)?),
                None => (mean, mean_abs),
            });
            linear(&h, down_proj)
        })?;
        count += batch.weights.iter().filter(|&&w| w > 0.0).count();
        progress(index + 1);
    }
    ensure!(count > 0, "no tokens to calibrate on: expected at least one document of two tokens");
    let layers = sums.into_iter().flatten().map(|(mean, mean_abs)| {
        let values =
            |sum: Tensor| -> Result<Vec<f32>> { Ok((sum.flatten_all()? / count as f64)?.to_vec1()?) };
        Ok(Activations { mean: values(mean)?, mean_abs: values(mean_abs)? })
    });
    Ok((layers.collect::<Result<_>>()?, count))
}

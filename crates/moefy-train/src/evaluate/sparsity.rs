//! Sparse activations: a baseline that makes the FFNs of a dense model cheaper without any training.
//!
//! TEAL (arXiv 2408.14690) sets those entries of a linear layer's input to zero whose magnitude is below a threshold: the
//! columns of the weight that they would meet need not be read. The threshold of each tensor is a quantile of its magnitudes
//! on calibration text, as the dense model has them. Here that is done in the FFNs, in each with
//!
//! ```text
//! x' = x where |x| ≥ t_x, else 0        h  = act(W_gate x') ∘ (W_up x')
//! h' = h where |h| ≥ t_h, else 0        y  = W_down h'
//! ```
//!
//! and the same share of zeros asked for in every `x` and `h`: TEAL's search for a share of each block's own tensors is not
//! done. Every token is sparse, the first ones too, where TEAL's published code leaves the first half of each input dense.
//!
//! What a token keeps of an FFN's weights is `(2 k_x / D + k_h / I) / 3` for `k_x` and `k_h` entries kept: gate and up read
//! `x`, down reads `h`, and each of the three has `D · I` weights. It takes the place of DynaMoE's width.

use anyhow::{Result, ensure};
use candle_core::{DType, Result as CandleResult, Tensor};
use dynamoe::train::glu::masked_glu;
use dynamoe::{HiddenAct, Projections};
use rayon::prelude::*;

use crate::data::{PaddedBatch, scored_by_others, scored_tokens};
use crate::progress::Progress;
use crate::ranks::Ranks;
use dynamoe_model::ops::linear;
use dynamoe_model::{ModelConfig, RoutedModel};

/// Magnitudes of a tensor that its quantiles are taken of, about and at most.
const SAMPLE: usize = 1 << 20;

/// The thresholds of a dense model at one sparsity.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// The share of entries to be set to zero, from 0 to below 1.
    pub sparsity: f64,
    /// First layer first.
    pub layers: Vec<LayerThresholds>,
}

/// Entries of smaller magnitude are set to zero.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LayerThresholds {
    /// Of `x`, the input of `gate_proj` and `up_proj`.
    pub input: f32,
    /// Of `h`, the neurons' activations and input of `down_proj`.
    pub neurons: f32,
}

/// Refuses another model than a dense one.
///
/// # Errors
/// A DynaMoE model.
pub fn check_dense(config: &ModelConfig) -> Result<()> {
    ensure!(
        config.dynamoe.is_none(),
        "a DynaMoE checkpoint; activation sparsity is a baseline of dense models: give the dense model that it is made from"
    );
    Ok(())
}

/// Refuses other numbers than shares that leave something.
///
/// # Errors
/// A sparsity below 0 or not below 1.
pub fn check_sparsities(sparsities: &[f64]) -> Result<()> {
    for sparsity in sparsities {
        ensure!(
            (0.0..1.0).contains(sparsity),
            "an activation sparsity must be 0 or more and below 1, found {sparsity}: it is the share of entries set to zero"
        );
    }
    Ok(())
}

/// Finds the thresholds for each of `sparsities` in one pass of the dense `model` over text. Batches run in parallel and on
/// all ranks.
///
/// # Errors
/// A DynaMoE model; a sparsity below 0 or not below 1; no tokens.
pub fn calibrate(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    sparsities: &[f64],
    ranks: &dyn Ranks,
) -> Result<Vec<Thresholds>> {
    check_sparsities(sparsities)?;
    check_dense(model.config())?;
    let tokens = scored_tokens(batches) as usize;
    ensure!(tokens > 0, "no tokens to find thresholds on: expected at least one document of two tokens");
    let progress = Progress::new("finding thresholds", "tokens", tokens as u64, 0);
    let places: Vec<usize> = batches
        .iter()
        .scan(0, |before, batch| Some(std::mem::replace(before, *before + batch.scored())))
        .collect();
    let own = ranks.own(batches.len());
    let samples = own
        .par_iter()
        .map(|&index| {
            let sample = sample_batch(model, &batches[index], places[index], tokens)?;
            progress.add(batches[index].scored() as u64);
            Ok(sample)
        })
        .collect::<Result<Vec<_>>>()?;
    progress.add(scored_by_others(batches, &own));
    let mut found: Vec<Thresholds> =
        sparsities.iter().map(|&sparsity| Thresholds { sparsity, layers: Vec::new() }).collect();
    for layer in 0..model.config().num_hidden_layers {
        let [mut input, mut neurons] = [0, 1].map(|tensor| {
            let wide =
                |sample: &Vec<[Vec<f32>; 2]>| sample[layer][tensor].iter().map(|&m| f64::from(m)).collect();
            let all = ranks.all_gather_own(batches.len(), &samples.iter().map(wide).collect::<Vec<_>>());
            all.into_iter().flatten().map(|magnitude| magnitude as f32).collect::<Vec<f32>>()
        });
        for Thresholds { sparsity, layers } in &mut found {
            layers.push(LayerThresholds {
                input: quantile(&mut input, *sparsity),
                neurons: quantile(&mut neurons, *sparsity),
            });
        }
    }
    progress.finish();
    Ok(found)
}

/// For each layer: magnitudes of `x` and of `h` for a batch that has `before` of all `tokens` before it.
fn sample_batch(
    model: &RoutedModel,
    batch: &PaddedBatch,
    before: usize,
    tokens: usize,
) -> Result<Vec<[Vec<f32>; 2]>> {
    let (inputs, ..) = batch.tensors(model.device())?;
    let act = model.config().hidden_act;
    let mut layers = Vec::new();
    model.forward_ffns(&inputs, &mut |layer, x| {
        let ffn = model.ffns()[layer].experts().matrices();
        let h = neurons(ffn, act, x)?;
        let y = linear(&h, &ffn.down_proj)?;
        layers.push([magnitudes(x, batch, before, tokens)?, magnitudes(&h, batch, before, tokens)?]);
        Ok(y)
    })?;
    Ok(layers)
}

/// Magnitudes of every `n`-th entry of the scored rows of `x (N, K)`, evenly spread over tokens and columns: `n` has no
/// factor in common with the number of columns.
fn magnitudes(x: &Tensor, batch: &PaddedBatch, before: usize, tokens: usize) -> CandleResult<Vec<f32>> {
    let columns = x.dim(1)?;
    let mut step = (tokens * columns).div_ceil(SAMPLE);
    while common_factor(step, columns) > 1 {
        step += 1;
    }
    let x = x.flatten_all()?.to_vec1::<f32>()?;
    let scored = x.chunks_exact(columns).zip(&batch.weights).filter(|(_, weight)| **weight > 0.0);
    let starts = (before..).map(|token| (token * columns).next_multiple_of(step) - token * columns);
    let of_row = |((row, _), start): ((&[f32], _), usize)| {
        row.iter().skip(start).step_by(step).map(|value| value.abs()).collect::<Vec<f32>>()
    };
    Ok(scored.zip(starts).flat_map(of_row).collect())
}

/// The greatest one.
fn common_factor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_factor(b, a % b) }
}

/// The magnitude below which a share `sparsity` of all lies, rounded down to whole ones. 0, below which there is none, where
/// that is none of them. The order changes.
fn quantile(magnitudes: &mut [f32], sparsity: f64) -> f32 {
    match (sparsity * magnitudes.len() as f64) as usize {
        0 => 0.0,
        below => {
            let below = below.min(magnitudes.len() - 1); // a product may be rounded up
            *magnitudes.select_nth_unstable_by(below, f32::total_cmp).1
        }
    }
}

/// Runs `tokens (B, T)` with sparse activations. Returns the hidden states after the final norm, `(B·T, D)`, and for each
/// layer the share of the FFN's weights that each token keeps, `(B·T)`.
///
/// # Errors
/// A token outside the vocabulary.
pub fn forward(
    model: &RoutedModel,
    tokens: &Tensor,
    thresholds: &Thresholds,
) -> CandleResult<(Tensor, Vec<Vec<f64>>)> {
    let act = model.config().hidden_act;
    let mut kept = Vec::with_capacity(thresholds.layers.len());
    let hidden = model.forward_ffns(tokens, &mut |layer, x| {
        let ffn = model.ffns()[layer].experts().matrices();
        let (y, of_layer) = sparse_ffn(ffn, act, x, thresholds.layers[layer])?;
        kept.push(of_layer);
        Ok(y)
    })?;
    Ok((hidden, kept))
}

/// One FFN with sparse activations: `x (N, D)` → `y (N, D)`, and the share of its weights that each row keeps, `(N)`.
fn sparse_ffn(
    ffn: &Projections<Tensor>,
    act: HiddenAct,
    x: &Tensor,
    thresholds: LayerThresholds,
) -> CandleResult<(Tensor, Vec<f64>)> {
    let (x, kept_input) = sparsified(x, thresholds.input)?;
    let (h, kept_neurons) = sparsified(&neurons(ffn, act, &x)?, thresholds.neurons)?;
    let kept = kept_input.into_iter().zip(kept_neurons);
    let kept = kept.map(|(input, neurons)| (2.0 * input + neurons) / 3.0).collect();
    Ok((linear(&h, &ffn.down_proj)?, kept))
}

/// `h = act(W_gate x) ∘ (W_up x)`: `x (N, D)` → `(N, I)`, on a CPU to the bit as the dense FFN has it.
fn neurons(ffn: &Projections<Tensor>, act: HiddenAct, x: &Tensor) -> CandleResult<Tensor> {
    let (gate, up) = (linear(x, &ffn.gate_proj)?, linear(x, &ffn.up_proj)?);
    let (rows, width) = gate.dims2()?;
    // one shell that every row uses
    masked_glu(act, &gate, &up, &Tensor::ones((rows, 1), DType::F32, x.device())?, &[width])
}

/// `x (N, K)` without the entries whose magnitude is below `threshold`, and the share that each row keeps, `(N)`.
fn sparsified(x: &Tensor, threshold: f32) -> CandleResult<(Tensor, Vec<f64>)> {
    let columns = x.dim(1)? as f64;
    let small = x.abs()?.lt(threshold)?; // what is not a number stays, and shows in the loss
    let zeros = small.to_dtype(DType::F32)?.sum(1)?.to_vec1::<f32>()?;
    let kept = zeros.into_iter().map(|zeros| 1.0 - f64::from(zeros) / columns).collect();
    Ok((small.where_cond(&x.zeros_like()?, x)?, kept))
}

#[cfg(test)]
mod tests;

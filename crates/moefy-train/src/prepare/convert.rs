//! A dense checkpoint becomes a DynaMoE checkpoint: in every FFN, neurons in descending order of importance, so
//! that each prefix is an expert, and a fresh router.
//!
//! ```text
//! y = W_down (act(W_gate x) ∘ (W_up x)) = W_down[:, p] (act(W_gate[p] x) ∘ (W_up[p] x))   for any order p
//! ```
//!
//! Tensors stream through in chunks; the largest thing in memory is one of an FFN's matrices.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dynamoe::config::{DynaMoeConfig, RouterConfig, RouterKind, version_for};
use dynamoe::router::logit;
use dynamoe::tensors;
use rand_distr::{Distribution, Normal};
use safetensors::Dtype;

use super::calibrate::{Calibration, LayerStatistics};
use crate::progress::Progress;
use crate::random;
use dynamoe_model::checkpoint::copy::{copy_tensor, write_folder};
use dynamoe_model::checkpoint::{
    CHUNK_BYTES, Checkpoint, TensorSpec, Writer, check_finite, plan_shards, set_section,
};
use dynamoe_model::config::ModelConfig;
use dynamoe_model::tensors::added_tensors;

const FFN: [&str; 3] = [tensors::GATE_PROJ, tensors::UP_PROJ, tensors::DOWN_PROJ];

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// `H_e` of each expert; [`dynamoe::config::even_widths`] makes the paper's.
    pub expert_widths: Vec<usize>,
    /// For how many of the first shells the smaller experts get separate weights, as copies.
    pub separate_shells: usize,
    /// The routers to add.
    pub router: RouterConfig,
    /// Seed of the routers' weights.
    pub seed: u64,
    /// The dial's default.
    pub sensitivity: f64,
    /// Replace an existing output folder.
    pub force: bool,
    /// Largest shard; none keeps the source's shards.
    pub max_shard_bytes: Option<u64>,
}

impl ConvertOptions {
    /// The `dynamoe` section of the converted model's config.json; `config` is the dense model's.
    pub fn section(&self, config: &ModelConfig) -> DynaMoeConfig {
        DynaMoeConfig {
            version: version_for(self.separate_shells, config.hidden_act),
            base_architecture: config.architecture.name().to_owned(),
            base_model_type: config.architecture.model_type().to_owned(),
            hidden_act: config.hidden_act,
            expert_widths: self.expert_widths.clone(),
            separate_shells: self.separate_shells,
            router: self.router.clone(),
            sensitivity: self.sensitivity,
            budgets: Vec::new(),
        }
    }
}

/// Converts `source` into the new folder `out`. Neurons are ordered by the calibration's importance, or without
/// one by `‖W_gate[j]‖ · ‖W_up[j]‖ · ‖W_down[:, j]‖`. The source is only read.
///
/// # Errors
/// A source that is a DynaMoE checkpoint already or holds values that are not finite, a calibration of another
/// model, widths that do not fit, an output folder that exists or cannot be written. Nothing is left then.
pub fn convert(
    source: &Checkpoint,
    calibration: Option<&Calibration>,
    options: &ConvertOptions,
    out: &Path,
) -> Result<()> {
    ensure!(
        source.config().dynamoe.is_none(),
        "{}: is a DynaMoE checkpoint already; `export --dense` makes a dense one of it",
        source.dir().display()
    );
    if let Some(calibration) = calibration {
        calibration.check(source)?;
    }
    let mut json = source.json().clone();
    let section = options.section(source.config());
    set_section(&mut json, &section)?;
    let config = ModelConfig::from_json(&json)?;
    let plan = plan(source, &config, options.max_shard_bytes)?;
    let ffns: HashSet<String> = (0..config.num_hidden_layers)
        .flat_map(|layer| FFN.map(|name| tensors::full_name(layer, name)))
        .collect();
    let progress = Progress::new("converting", "layers", config.num_hidden_layers as u64, 0);
    write_folder(source, &json, plan, out, options.force, |writer| {
        for name in source.names().filter(|name| !ffns.contains(*name)) {
            let dtype = source.info(name).map_or(Dtype::F32, |info| info.dtype);
            copy_tensor(source, name, dtype, writer)?;
        }
        for layer in 0..config.num_hidden_layers {
            let statistics = calibration.map(|c| &c.layers[layer]);
            let compensation = convert_ffn(source, layer, statistics, &section, writer)?;
            write_router(&config, layer, options.seed, &compensation, writer)?;
            progress.add(1);
        }
        Ok(())
    })?;
    progress.finish();
    Ok(())
}

/// The source's tensors; what a layer gets besides stands beside its down_proj, routers in F32 and copies of neurons
/// in the type of their originals.
fn plan(source: &Checkpoint, config: &ModelConfig, max: Option<u64>) -> Result<Vec<Vec<TensorSpec>>> {
    let mut shards = source.plan();
    for (name, shape) in added_tensors(config) {
        let (layer, _) = name.split_once(".mlp.").context("additions are under mlp")?;
        let down = format!("{layer}.mlp.{}", tensors::DOWN_PROJ);
        let shard = source.info(&down).map_or(0, |info| info.shard);
        let dtype = source.info(&name.replace(".own.", ".")).map_or(Dtype::F32, |original| original.dtype);
        shards[shard].push(TensorSpec { name, dtype, shape });
    }
    for layer in 0..config.num_hidden_layers {
        let down = tensors::full_name(layer, tensors::DOWN_PROJ);
        let shard = source.info(&down).map_or(0, |info| info.shard);
        let (name, shape) = (tensors::full_name(layer, tensors::ORDER), vec![config.intermediate_size]);
        shards[shard].push(TensorSpec { name, dtype: Dtype::F32, shape });
    }
    Ok(match max {
        Some(max) => plan_shards(shards.into_iter().flatten().collect(), max),
        None => shards,
    })
}

/// Writes a layer's FFN with its neurons reordered; each expert's compensation but the largest's,
/// `(E - 1) · D` values.
fn convert_ffn(
    source: &Checkpoint,
    layer: usize,
    statistics: Option<&LayerStatistics>,
    section: &DynaMoeConfig,
    writer: &mut Writer,
) -> Result<Vec<f32>> {
    let [gate, up, down] = FFN.map(|name| tensors::full_name(layer, name));
    let importance = match statistics {
        Some(statistics) => statistics.importance.clone(),
        None => weight_importance(source, &gate, &up, &down)?,
    };
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a])); // stable
    let numbers: Vec<u8> = order.iter().flat_map(|&j| (j as f32).to_le_bytes()).collect();
    writer.push(&tensors::full_name(layer, tensors::ORDER), &numbers)?;
    permute_rows(source, Copied { from: &gate, to: &gate }, &order, writer)?;
    permute_rows(source, Copied { from: &up, to: &up }, &order, writer)?;
    let first = &order[..section.separate_width()];
    if !first.is_empty() {
        let [separate_gate, separate_up, separate_down] =
            tensors::SEPARATE_TENSORS.map(|name| tensors::full_name(layer, name));
        permute_rows(source, Copied { from: &gate, to: &separate_gate }, first, writer)?;
        permute_rows(source, Copied { from: &up, to: &separate_up }, first, writer)?;
        permute_columns(source, Copied { from: &down, to: &separate_down }, first, writer, |_, _| {})?;
    }

    let (experts, hidden) = (section.expert_count() - 1, source.config().hidden_size);
    let mut compensation = vec![0.0; experts * hidden];
    let mean: Option<Vec<f32>> = statistics.map(|s| order.iter().map(|&j| s.mean_activation[j]).collect());
    permute_columns(source, Copied { from: &down, to: &down }, &order, writer, |d, row| {
        let Some(mean) = &mean else { return };
        // Σ_{j ≥ H_e} mean_j W_down[d, j], from the last shell inwards
        let mut sum = 0.0;
        for e in (0..experts).rev() {
            let shell = section.expert_widths[e]..section.expert_widths[e + 1];
            sum += row[shell.clone()]
                .iter()
                .zip(&mean[shell])
                .map(|(w, h)| f64::from(*w) * f64::from(*h))
                .sum::<f64>();
            compensation[e * hidden + d] = sum as f32;
        }
    })?;
    Ok(compensation)
}

/// `‖W_gate[j]‖ · ‖W_up[j]‖ · ‖W_down[:, j]‖` for each neuron.
fn weight_importance(source: &Checkpoint, gate: &str, up: &str, down: &str) -> Result<Vec<f32>> {
    let mut importance = vec![1.0; source.config().intermediate_size];
    for name in [gate, up] {
        for_rows(source, name, |j, row| {
            importance[j] *= row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
        })?;
    }
    let mut squares = vec![0.0; importance.len()];
    for_rows(source, down, |_, row| {
        squares.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*w).powi(2));
    })?;
    Ok(importance.iter().zip(squares).map(|(a, b)| (a * f64::sqrt(b)) as f32).collect())
}

/// Calls `each` with the number and the values of every row of a matrix.
fn for_rows(source: &Checkpoint, name: &str, mut each: impl FnMut(usize, &[f32])) -> Result<()> {
    for_row_chunks(source, name, |first, bytes, matrix| {
        let values = decode(bytes, matrix.dtype);
        values.chunks_exact(matrix.columns).enumerate().for_each(|(i, row)| each(first + i, row));
        Ok(())
    })
}

struct Matrix {
    dtype: Dtype,
    columns: usize,
    row_bytes: usize,
}

/// Calls `each` with the first row's number and the bytes of runs of whole rows, about [`CHUNK_BYTES`] each,
/// once their values are known to be finite.
fn for_row_chunks(
    source: &Checkpoint,
    name: &str,
    mut each: impl FnMut(usize, &[u8], &Matrix) -> Result<()>,
) -> Result<()> {
    let info = source.info(name).with_context(|| format!("tensor {name} not found"))?;
    let columns = info.shape[1];
    let matrix = Matrix { dtype: info.dtype, columns, row_bytes: info.len / info.shape[0] };
    let rows = (CHUNK_BYTES / matrix.row_bytes).max(1);
    for first in (0..info.shape[0]).step_by(rows) {
        let end = info.shape[0].min(first + rows);
        let bytes = source.read_range(name, first * matrix.row_bytes..end * matrix.row_bytes)?;
        check_finite(name, &bytes, info.dtype, &info.shape, first * columns)?;
        each(first, &bytes, &matrix)?;
    }
    Ok(())
}

/// The name of a matrix in the source, and its name in what is written.
#[derive(Clone, Copy)]
struct Copied<'a> {
    from: &'a str,
    to: &'a str,
}

/// Writes a matrix, with its row `order[i]` as row `i`.
fn permute_rows(
    source: &Checkpoint,
    Copied { from, to }: Copied,
    order: &[usize],
    writer: &mut Writer,
) -> Result<()> {
    let info = source.info(from).with_context(|| format!("tensor {from} not found"))?;
    let bytes = source.read_bytes(from)?;
    check_finite(from, &bytes, info.dtype, &info.shape, 0)?;
    let row = bytes.len() / info.shape[0];
    let mut chunk = Vec::with_capacity(CHUNK_BYTES + row);
    for &j in order {
        chunk.extend_from_slice(&bytes[j * row..(j + 1) * row]);
        if chunk.len() >= CHUNK_BYTES {
            writer.push(to, &chunk)?;
            chunk.clear();
        }
    }
    writer.push(to, &chunk)
}

/// Writes a matrix, with its column `order[i]` as column `i`; shows every new row to `each`.
fn permute_columns(
    source: &Checkpoint,
    Copied { from, to }: Copied,
    order: &[usize],
    writer: &mut Writer,
    mut each: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let mut permuted = Vec::new();
    for_row_chunks(source, from, |first, bytes, matrix| {
        permuted.clear();
        permuted.reserve(bytes.len() / matrix.columns * order.len());
        for row in bytes.chunks_exact(matrix.row_bytes) {
            match matrix.row_bytes / matrix.columns {
                2 => gather::<2>(row, order, &mut permuted),
                _ => gather::<4>(row, order, &mut permuted),
            }
        }
        let values = decode(&permuted, matrix.dtype);
        values.chunks_exact(order.len()).enumerate().for_each(|(i, row)| each(first + i, row));
        writer.push(to, &permuted)
    })
}

/// Appends the elements of `row`, each of `N` bytes, in the given order.
fn gather<const N: usize>(row: &[u8], order: &[usize], out: &mut Vec<u8>) {
    let (elements, _) = row.as_chunks::<N>();
    order.iter().for_each(|&j| out.extend_from_slice(&elements[j]));
}

/// Little-endian F32, F16 or BF16 values as f32.
fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let (pairs, _) = bytes.as_chunks::<2>();
    match dtype {
        Dtype::F16 => pairs.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

/// Writes a layer's router: `fc1.weight ~ N(0, 1/D)`, zeros and `fc2.bias = logit(H_e / I)`: until it is
/// trained, it routes as a static one does.
fn write_router(
    config: &ModelConfig,
    layer: usize,
    seed: u64,
    compensation: &[f32],
    writer: &mut Writer,
) -> Result<()> {
    let Some(dynamoe) = &config.dynamoe else { return Ok(()) };
    let mut push = |name: &str, values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.push(&tensors::full_name(layer, name), &bytes)
    };
    if dynamoe.router.kind == RouterKind::Mlp {
        let (d, r) = (config.hidden_size, dynamoe.router.hidden_size);
        let mut rng = random::router(seed, layer);
        let normal = Normal::new(0.0f32, (d as f32).sqrt().recip())?;
        let fc1: Vec<f32> = (0..r * d).map(|_| normal.sample(&mut rng)).collect();
        let shares = dynamoe.width_shares();
        let bias: Vec<f32> = shares[..shares.len() - 1].iter().map(|&share| logit(share)).collect();
        push(tensors::ROUTER_FC1_WEIGHT, &fc1)?;
        push(tensors::ROUTER_FC1_BIAS, &vec![0.0; r])?;
        push(tensors::ROUTER_FC2_WEIGHT, &vec![0.0; bias.len() * r])?;
        push(tensors::ROUTER_FC2_BIAS, &bias)?;
    }
    if dynamoe.router.compensation {
        push(tensors::COMPENSATION, compensation)?;
    }
    Ok(())
}

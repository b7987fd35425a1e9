//! An ordinary model of any width: the first neurons of every FFN, for all tokens.
//!
//! ```text
//! y = W_down[:, :W] h[:W] + c        neurons j < P are the smaller experts' separate weights
//! ```
//!
//! At the width of an expert this is what the expert computes. `c` is the compensation: a bias of `down_proj`, which
//! the FFNs of some architectures may have, Llama's among them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use dynamoe::DynaMoeConfig;
use dynamoe::tensors::{self, is_addition};
use serde_json::json;

use crate::checkpoint::copy::{copy_tensor, write_folder};
use crate::checkpoint::{Checkpoint, TensorSpec, Writer, plan_shards, remove_section};
use crate::config::ModelConfig;
use crate::export::{ExportOptions, set_dtype, write_each};
use crate::tensors::{FFN_BIASES, ffn_biases};

/// Widths are multiples of this power of two at most: engines quantize in blocks of 256.
const BLOCK: usize = 256;

/// The matrices of an FFN, and the separate weights of each.
const MATRICES: [(&str, &str); 3] = [
    (tensors::GATE_PROJ, tensors::SEPARATE_GATE_PROJ),
    (tensors::UP_PROJ, tensors::SEPARATE_UP_PROJ),
    (tensors::DOWN_PROJ, tensors::SEPARATE_DOWN_PROJ),
];

/// What a slice is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// Neurons of every FFN.
    pub width: usize,
    /// Widths are rounded to a multiple of this: the largest power of two up to 256 that divides every expert's width.
    pub multiple: usize,
    /// How many of the first neurons are the smaller experts' separate weights.
    pub separate: usize,
    /// What becomes of the compensation.
    pub compensation: Compensation,
}

/// What becomes of the compensation in a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compensation {
    /// There is none at this width, or the checkpoint has none.
    Nothing,
    /// It is the bias of `down_proj`.
    Bias,
    /// The base architecture's FFN has no biases: it is left out.
    LeftOut,
}

impl Slice {
    /// The slice of a checkpoint at `share` of the FFN's width.
    ///
    /// # Errors
    /// A share that is not above 0 and at most 1; a dense model.
    pub fn of(source: &Checkpoint, share: f64) -> Result<Self> {
        ensure!(
            share > 0.0 && share <= 1.0,
            "--width is a share of the FFN's width: expected a number above 0 and at most 1, found {share}"
        );
        let config = source.config();
        let section = config.dynamoe.as_ref().with_context(|| {
            format!("{}: a dense model; --width cuts a DynaMoE checkpoint", source.dir().display())
        })?;
        let bits = section.expert_widths.iter().fold(BLOCK, |bits, width| bits | width);
        let multiple = 1 << bits.trailing_zeros();
        let full = config.intermediate_size;
        let rounded = (share * full as f64 / multiple as f64).round() as usize * multiple;
        let width = rounded.clamp(multiple, full);
        let compensation = match config.architecture {
            _ if width == full || !section.router.compensation => Compensation::Nothing,
            architecture if architecture.has_ffn_biases() => Compensation::Bias,
            _ => Compensation::LeftOut,
        };
        let separate = if width == full { 0 } else { section.separate_width().min(width) };
        Ok(Self { width, multiple, separate, compensation })
    }
}

/// Writes the slice into the new folder `out`, in the type and shards that `options` say. At full width it is the dense
/// model, with its neurons in the order of the checkpoint. `written` is told how far it is, as by
/// [`crate::export::export`].
///
/// # Errors
/// Those of [`crate::export::export`].
pub fn export_slice(
    source: &Checkpoint,
    slice: &Slice,
    options: &ExportOptions,
    out: &Path,
    written: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let mut config = source.json().clone();
    remove_section(&mut config)?;
    config["intermediate_size"] = json!(slice.width);
    if slice.compensation == Compensation::Bias {
        config["mlp_bias"] = json!(true);
    }
    set_dtype(&mut config, options.dtype);
    let plan = plan(source, slice, options, &ModelConfig::from_json(&config)?);
    let specs: Vec<_> = plan.iter().flatten().cloned().collect();
    write_folder(source, &config, plan, out, options.force, |writer| {
        write_each(&specs, written, |spec| match spec.name.split_once(".mlp.") {
            Some((layer, name)) => push_ffn(source, slice, layer, name, spec, writer),
            None => copy_tensor(source, &spec.name, spec.dtype, writer),
        })
    })
    .with_context(|| format!("exporting {}", source.dir().display()))
}

/// The tensors of the slice, where those that they are cut from are; `config` is the slice's.
fn plan(
    source: &Checkpoint,
    slice: &Slice,
    options: &ExportOptions,
    config: &ModelConfig,
) -> Vec<Vec<TensorSpec>> {
    let mut plan = source.plan();
    for shard in &mut plan {
        shard.retain(|spec| !is_addition(&spec.name));
        let mut biases = Vec::new();
        for spec in shard.iter_mut() {
            spec.dtype = options.dtype.unwrap_or(spec.dtype);
            let Some((layer, name)) = spec.name.split_once(".mlp.") else { continue };
            if name == tensors::DOWN_PROJ {
                biases.extend(ffn_biases(config).into_iter().flatten().map(|(bias, shape)| TensorSpec {
                    name: format!("{layer}.mlp.{bias}"),
                    dtype: spec.dtype,
                    shape,
                }));
            }
            if MATRICES.iter().any(|(matrix, _)| *matrix == name) {
                spec.shape[neuron_axis(name)] = slice.width;
            }
        }
        shard.extend(biases);
    }
    plan.retain(|shard| !shard.is_empty());
    match options.max_shard_bytes {
        Some(max) => plan_shards(plan.into_iter().flatten().collect(), max),
        None => plan,
    }
}

/// The dimension of an FFN's matrix that counts neurons: columns of `down_proj`, rows of the others.
fn neuron_axis(name: &str) -> usize {
    usize::from(name.ends_with(tensors::DOWN_PROJ))
}

/// Writes a tensor of an FFN; `layer` is what its name begins with.
fn push_ffn(
    source: &Checkpoint,
    slice: &Slice,
    layer: &str,
    name: &str,
    spec: &TensorSpec,
    writer: &mut Writer,
) -> Result<()> {
    let tensor = match MATRICES.iter().find(|(matrix, _)| *matrix == name) {
        Some((_, separate)) => matrix(source, slice, &spec.name, &format!("{layer}.mlp.{separate}"))?,
        None if name == FFN_BIASES[2] => compensation(source, slice.width, layer)?,
        None => Tensor::zeros(spec.shape.as_slice(), DType::F32, &Device::Cpu)?,
    };
    writer.push_tensor(&spec.name, &tensor, spec.dtype)
}

/// The first neurons of a matrix, `(W, D)` or `(D, W)`: the smaller experts' where these have separate weights.
fn matrix(source: &Checkpoint, slice: &Slice, name: &str, separate: &str) -> Result<Tensor> {
    let read = |name: &str| -> Result<Tensor> {
        let info = source.info(name).with_context(|| format!("tensor {name} not found"))?;
        source.tensor(name, &info.shape, DType::F32, &Device::Cpu)
    };
    let axis = neuron_axis(name);
    let shared = read(name)?.narrow(axis, slice.separate, slice.width - slice.separate)?;
    if slice.separate == 0 {
        return Ok(shared);
    }
    let own = read(separate)?.narrow(axis, 0, slice.separate)?;
    Ok(if slice.separate == slice.width { own } else { Tensor::cat(&[own, shared], axis)? })
}

/// The compensation of a layer at `width`, `(D)`: between two experts, linear in the width; the largest has none.
fn compensation(source: &Checkpoint, width: usize, layer: &str) -> Result<Tensor> {
    let config = source.config();
    let section = config.dynamoe.as_ref().context("a DynaMoE checkpoint has a section")?;
    let name = format!("{layer}.mlp.{}", tensors::COMPENSATION);
    let shape = [section.expert_count() - 1, config.hidden_size];
    let table = source.tensor(&name, &shape, DType::F32, &Device::Cpu)?; // (E - 1, D)
    let zero = Tensor::zeros((1, config.hidden_size), DType::F32, &Device::Cpu)?;
    let table = Tensor::cat(&[table, zero], 0)?; // (E, D)
    let (below, above, share) = neighbours(section, width);
    let (below, above) = (table.get(below)?, table.get(above)?);
    Ok(((below * (1.0 - share))? + (above * share)?)?)
}

/// The experts around a width, and how far it is from the smaller to the larger, from 0 to 1.
fn neighbours(section: &DynaMoeConfig, width: usize) -> (usize, usize, f64) {
    let widths = &section.expert_widths;
    let above = widths.iter().position(|expert| *expert >= width).unwrap_or(widths.len() - 1);
    let below = if widths[above] == width { above } else { above.saturating_sub(1) };
    let (low, high) = (widths[below], widths[above]);
    let share = if high > low { (width - low) as f64 / (high - low) as f64 } else { 0.0 };
    (below, above, share)
}

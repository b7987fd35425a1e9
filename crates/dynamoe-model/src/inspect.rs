//! What a checkpoint is, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use dynamoe::tensors::is_order;
use dynamoe::{Budget, RouterConfig};
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::tensors::{added_tensors, expected_tensors, router_tensors};

/// A nested expert.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Expert {
    /// Its neurons, `H_e`.
    pub width: usize,
    /// Its share of the dense FFN.
    pub share: f64,
    /// Parameters that a token uses which takes this expert in every layer, without the routers'.
    pub active_parameters: usize,
}

/// The DynaMoE part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DynaMoePart {
    /// Format version.
    pub version: u32,
    /// Smallest first.
    pub experts: Vec<Expert>,
    /// For how many of the first shells the smaller experts have separate weights.
    #[serde(rename = "own_shells")]
    pub separate_shells: usize,
    /// Parameters of these separate weights.
    #[serde(rename = "own_parameters")]
    pub separate_parameters: usize,
    /// The routers' configuration.
    pub router: RouterConfig,
    /// Parameters of all routers, compensation included.
    pub router_parameters: usize,
    /// Bytes of all routers, compensation included.
    pub router_bytes: u64,
    /// The dial's default.
    pub sensitivity: f64,
    /// Sensitivities for mean widths.
    pub budgets: Vec<Budget>,
}

/// What [`inspect`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The folder.
    pub model: String,
    /// The add-on's folder, if the model is a base with one.
    pub add_on: Option<String>,
    /// The base architecture's name.
    pub architecture: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// `hidden_size`.
    pub hidden_size: usize,
    /// `intermediate_size`.
    pub intermediate_size: usize,
    /// `vocab_size`.
    pub vocab_size: usize,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// Parameters of the dense model.
    pub parameters: usize,
    /// Bytes of tensors by their type.
    pub dtypes: BTreeMap<String, u64>,
    /// Number of safetensors files.
    pub shards: usize,
    /// Tensors in the files that the model does not read.
    pub unused_tensors: Vec<String>,
    /// None for a dense model.
    pub dynamoe: Option<DynaMoePart>,
}

/// Describes the checkpoint in `dir`, from its config and headers; no weights are read.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn inspect(dir: &Path) -> Result<Inspection> {
    Ok(describe(&Checkpoint::open(dir)?))
}

/// Describes an open checkpoint.
pub fn describe(checkpoint: &Checkpoint) -> Inspection {
    let config = checkpoint.config();
    let size = |tensors: &[(String, Vec<usize>)]| -> usize {
        tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    };
    let (all, added, routers) = (expected_tensors(config), added_tensors(config), router_tensors(config));
    let parameters = size(&all) - size(&added);
    let mut dtypes = BTreeMap::new();
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        *dtypes.entry(info.dtype.to_string()).or_default() += info.len as u64;
    }
    let router_bytes =
        routers.iter().filter_map(|(name, _)| checkpoint.info(name)).map(|info| info.len as u64).sum();
    let used: std::collections::HashSet<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
    let neuron = 3 * config.hidden_size * config.num_hidden_layers; // gate, up and down, in all layers
    let dynamoe = config.dynamoe.as_ref().map(|section| DynaMoePart {
        version: section.version,
        experts: section
            .expert_widths
            .iter()
            .zip(section.width_shares())
            .map(|(&width, share)| Expert {
                width,
                share,
                active_parameters: parameters - neuron * (config.intermediate_size - width),
            })
            .collect(),
        separate_shells: section.separate_shells,
        separate_parameters: size(&added) - size(&routers),
        router: section.router.clone(),
        router_parameters: size(&routers),
        router_bytes,
        sensitivity: section.sensitivity,
        budgets: section.budgets.clone(),
    });
    let unused = checkpoint.names().filter(|name| !used.contains(name) && !is_order(name));
    Inspection {
        model: checkpoint.dir().display().to_string(),
        add_on: checkpoint.add_on().map(|dir| dir.display().to_string()),
        architecture: config.architecture.name(),
        layers: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        parameters,
        dtypes,
        shards: checkpoint.shards().len(),
        unused_tensors: unused.map(str::to_owned).collect(),
        dynamoe,
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.dynamoe.is_some() { "DynaMoE" } else { "dense" };
        let dtypes: Vec<String> =
            self.dtypes.iter().map(|(dtype, bytes)| format!("{dtype} {}", bytes_text(*bytes))).collect();
        row(f, "model", &self.model)?;
        if let Some(add_on) = &self.add_on {
            row(f, "add-on", add_on)?;
        }
        row(f, "architecture", &format!("{} ({kind})", self.architecture))?;
        row(f, "parameters", &count_text(self.parameters))?;
        row(f, "layers", &self.layers)?;
        row(f, "hidden size", &self.hidden_size)?;
        row(f, "FFN width", &self.intermediate_size)?;
        row(f, "vocabulary", &self.vocab_size)?;
        row(f, "positions", &self.max_position_embeddings)?;
        row(f, "weights", &format!("{} in {} file(s)", dtypes.join(", "), self.shards))?;
        if let [first, rest @ ..] = self.unused_tensors.as_slice() {
            row(f, "unused tensors", &format!("{} ({first}, …)", rest.len() + 1))?;
        }
        match &self.dynamoe {
            Some(part) => part.fmt_rows(f),
            None => Ok(()),
        }
    }
}

impl DynaMoePart {
    fn fmt_rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, "format version", &self.version)?;
        let compensation = if self.router.compensation { ", with compensation" } else { "" };
        row(
            f,
            "router",
            &format!("{:?}, hidden size {}{compensation}", self.router.kind, self.router.hidden_size),
        )?;
        let routers = format!("{}, {}", count_text(self.router_parameters), bytes_text(self.router_bytes));
        row(f, "all routers", &routers)?;
        if self.separate_shells > 0 {
            let separate =
                format!("{} shell(s), {}", self.separate_shells, count_text(self.separate_parameters));
            row(f, "separate weights", &separate)?;
        }
        row(f, "sensitivity", &self.sensitivity)?;
        writeln!(f, "\nexpert   width   share   active parameters")?;
        for (number, expert) in self.experts.iter().enumerate() {
            writeln!(
                f,
                "{number:>6} {:>7} {:>6.1}% {:>19}",
                expert.width,
                100.0 * expert.share,
                count_text(expert.active_parameters)
            )?;
        }
        if self.budgets.is_empty() {
            return writeln!(
                f,
                "\nno budgets yet: `moefy-train evaluate --budget …` measures and stores them"
            );
        }
        writeln!(f, "\nbudget   sensitivity")?;
        for budget in &self.budgets {
            let sensitivity = match &budget.sensitivity {
                dynamoe::Sensitivity::Uniform(s) => format!("{s:.4}"),
                dynamoe::Sensitivity::PerLayer(list) => {
                    list.iter().map(|s| format!("{s:.4}")).collect::<Vec<_>>().join(" ")
                }
            };
            writeln!(f, "{:>5.1}%   {sensitivity}", 100.0 * budget.width)?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, label: &str, value: &dyn fmt::Display) -> fmt::Result {
    writeln!(f, "{label:<16} {value}")
}

fn bytes_text(bytes: u64) -> String {
    scaled(bytes as f64, &["B", "kB", "MB", "GB"])
}

fn count_text(count: usize) -> String {
    scaled(count as f64, &["", "thousand", "million", "billion"]).trim_end().to_owned()
}

/// Three digits or so, in the largest unit that leaves 1 or more before the point.
fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{value} {}", units[0]) } else { format!("{value:.2} {}", units[unit]) }
}

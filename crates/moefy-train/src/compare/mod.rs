//! Methods and settings × seeds on the same tokens in the same order: which one suits a model?
//!
//! Each variant is trained once with each seed (a cell) and measured along its whole dial. A finished cell is
//! kept under `OUT/cells` by what it was told, so that a comparison that was stopped goes on, and one that gets
//! another variant or seed trains only that.

mod table;

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cli::{ExpertArgs, measure};
use crate::convert::convert;
use crate::curves::{curve, oracle_curve, spread};
use crate::data::{DataSource, PaddedBatch, Split};
use crate::results::Curve;
use crate::run::{Finetune, describe, routed, with_budgets, write};
use crate::texts::{TextArgs, Texts, calibration};
use crate::train::{Outcome, TrainConfig};
use dynamoe_model::checkpoint::{Checkpoint, write_atomic};
use dynamoe_model::{RoutedModel, hub};

pub use table::{Row, Table};

/// Tokens of training text on which a cell's dial is solved.
const SOLVE_TOKENS: usize = 8_192;

/// A named way to cut and train a model.
#[derive(Debug, Clone)]
pub struct Variant {
    /// Shown in the table.
    pub name: String,
    /// How the model is cut.
    pub experts: ExpertArgs,
    /// How it is trained; each seed replaces its own.
    pub train: TrainConfig,
}

/// A comparison.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Dense model: a folder or a hub id.
    pub model: String,
    /// Text to train on.
    pub data: Vec<DataSource>,
    /// Text to measure on; empty for a held-out part of `data`.
    pub valid: Vec<DataSource>,
    /// What is compared.
    pub variants: Vec<Variant>,
    /// Seeds of data order, dials, noise and routers.
    pub seeds: Vec<u64>,
    /// Mean widths at which the table compares.
    pub widths: Vec<f64>,
    /// Tokens that curves are measured on at most.
    pub eval_tokens: usize,
    /// The variant whose oracle is searched, with the first seed.
    pub oracle: Option<String>,
    /// Whether trained checkpoints are kept.
    pub keep: bool,
    /// How text is read.
    pub text: TextArgs,
}

/// One variant trained with one seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// The variant's name.
    pub variant: String,
    /// The seed.
    pub seed: u64,
    /// Training tokens.
    pub tokens: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Time of training on the clock; of the last part only, where it was resumed.
    pub seconds: f64,
    /// Loss along the dial.
    pub curve: Curve,
    /// The oracle's, if it was searched.
    pub oracle: Option<Curve>,
    /// All that the cell was told.
    pub told: Value,
}

/// A variant's overrides of the common options, as `--variants` names them.
///
/// # Errors
/// No name, one used twice, an unknown option, a value that does not fit.
pub fn variants(text: &str, experts: &ExpertArgs, train: &TrainConfig) -> Result<Vec<Variant>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        variant: Vec<toml::Table>,
    }
    let file: File = toml::from_str(text)?;
    let mut found: Vec<Variant> = Vec::new();
    for (number, mut table) in file.variant.into_iter().enumerate() {
        let name = table.remove("name").and_then(|name| Some(name.as_str()?.trim().to_owned()));
        let name = name.filter(|name| !name.is_empty());
        let name = name.with_context(|| format!("variant {}: needs a name", number + 1))?;
        ensure!(found.iter().all(|variant| variant.name != name), "variant {name:?}: the name is used twice");
        let variant = variant(&name, table, experts, train);
        found.push(variant.with_context(|| format!("variant {name:?}"))?);
    }
    ensure!(!found.is_empty(), "expected at least one [[variant]], found none");
    Ok(found)
}

fn variant(name: &str, table: toml::Table, experts: &ExpertArgs, train: &TrainConfig) -> Result<Variant> {
    let mut parts = [serde_json::to_value(experts)?, serde_json::to_value(train)?];
    for (key, value) in table {
        let key = key.replace('_', "-");
        ensure!(key != "seed", "seeds are those of the whole comparison: --seed and --seeds");
        let part = parts.iter_mut().find(|part| part.get(&key).is_some());
        let Some(part) = part else {
            bail!(
                "unknown key {key:?}; keys are the flags of `moefy-train compare --help` that cut and train"
            )
        };
        part[key] = serde_json::to_value(value)?;
    }
    let [experts, train] = parts;
    let train: TrainConfig = serde_json::from_value(train)?;
    train.validate()?;
    Ok(Variant { name: name.to_owned(), experts: serde_json::from_value(experts)?, train })
}

/// What all cells share.
struct Lab<'a> {
    comparison: &'a Comparison,
    dense: Checkpoint,
    texts: Texts,
    held_out: Vec<PaddedBatch>,
    out: &'a Path,
    device: &'a Device,
    stop: &'a AtomicBool,
}

/// Trains and measures what is not there yet, seed by seed, writing the table and the picture after each cell.
/// None where it was asked to stop.
///
/// # Errors
/// Those of the steps; options that do not fit the model, before anything is trained.
pub fn compare(
    comparison: &Comparison,
    out: &Path,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Option<Table>> {
    let dense = Checkpoint::open(&hub::resolve(&comparison.model)?)?;
    ensure!(dense.config().dynamoe.is_none(), "{}: a DynaMoE checkpoint; give a dense one", comparison.model);
    for variant in &comparison.variants {
        let checked = variant.train.validate().and_then(|()| {
            variant.experts.options(dense.config(), 0, false)?;
            Ok(())
        });
        checked.with_context(|| format!("variant {:?}", variant.name))?;
    }
    if let Some(name) = &comparison.oracle {
        let known = comparison.variants.iter().any(|v| &v.name == name && v.train.method.has_router());
        ensure!(known, "--oracle {name:?}: expected the name of a variant with a router");
    }
    let texts = Texts::open(dense.dir(), dense.config(), &comparison.text)?;
    let length = comparison.variants.iter().map(|v| v.train.sequence_length).max().unwrap_or(256);
    let held_out = texts.held_out(&comparison.data, &comparison.valid, length)?;
    let held_out = spread(&held_out, comparison.eval_tokens);
    let lab = Lab { comparison, dense, texts, held_out, out, device, stop };
    let (mut cells, mut table) = (Vec::new(), None);
    for &seed in &comparison.seeds {
        for variant in &comparison.variants {
            let Some(cell) = lab.cell(variant, seed)? else { return Ok(None) };
            cells.push(cell);
            let new = Table::new(&cells, &comparison.widths);
            new.write(out, &comparison.model)?;
            table = Some(new);
        }
    }
    table.context("nothing to compare: expected at least one variant and one seed").map(Some)
}

impl Lab<'_> {
    /// A finished cell, or one trained and measured now; none if asked to stop.
    fn cell(&self, variant: &Variant, seed: u64) -> Result<Option<Cell>> {
        let train = TrainConfig { seed, ..variant.train.clone() };
        let comparison = self.comparison;
        let oracle =
            comparison.oracle.as_ref() == Some(&variant.name) && Some(&seed) == comparison.seeds.first();
        let mut told = describe(&self.dense, &comparison.data, &train, &comparison.text)?;
        told["experts"] = serde_json::to_value(&variant.experts)?;
        told["valid"] = comparison.valid.iter().map(|s| s.path.display().to_string()).collect();
        told["eval-tokens"] = comparison.eval_tokens.into();
        told["widths"] = serde_json::to_value(&comparison.widths)?;
        told["oracle"] = oracle.into();
        let key = key(&variant.name, seed, &told);
        let (dir, done) = (self.out.join("cells").join(&key), self.out.join("cells").join(key + ".json"));
        if let Ok(bytes) = fs::read(&done) {
            return serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("{}: not a cell; remove it to train it again", done.display()));
        }
        tracing::info!("{}, seed {seed}", variant.name);
        let started = Instant::now();
        let split = if comparison.valid.is_empty() { Split::Train } else { Split::All };
        let shape = (train.batch_size, train.sequence_length);
        let batches = self.texts.training(&comparison.data, split, shape, seed)?;
        let converted = dir.join("converted");
        if !converted.join("config.json").is_file() {
            let measured = measure(&self.dense, &calibration(&batches, crate::texts::CALIBRATION_TOKENS))?;
            let options = variant.experts.options(self.dense.config(), seed, false)?;
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            convert(&self.dense, Some(&measured), &options, &converted)?;
        }
        let source = Checkpoint::open(&converted)?;
        let teacher = train.has_teacher().then(|| RoutedModel::load(&self.dense, self.device)).transpose()?;
        let job = Finetune {
            source: &source,
            teacher: teacher.as_ref(),
            config: &train,
            batches: &batches,
            state_dir: Some(&dir.join("state")),
            stop: self.stop,
            device: self.device,
        };
        let (model, outcome, _) = job.run()?;
        if outcome != Outcome::Finished {
            return Ok(None);
        }
        let seconds = started.elapsed().as_secs_f64();
        let config = with_budgets(&model, &calibration(&batches, SOLVE_TOKENS), &comparison.widths)?;
        if comparison.keep {
            write(
                &source,
                &model,
                &config,
                &self.out.join("checkpoints").join(dir.file_name().unwrap_or_default()),
            )?;
        }
        let mut curve =
            curve(&routed(&model, &config)?, train.method, &self.held_out, seed, &comparison.widths)?;
        curve.name.clone_from(&variant.name);
        let oracle = oracle.then(|| oracle_curve(&model, &self.held_out)).transpose()?;
        let cell = Cell {
            variant: variant.name.clone(),
            seed,
            tokens: train.steps() * train.tokens_per_step(),
            steps: train.steps(),
            seconds,
            curve,
            oracle,
            told,
        };
        write_atomic(&done, &serde_json::to_vec_pretty(&cell)?)?;
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        Ok(Some(cell))
    }
}

/// A file name for a cell: readable, and different where it was told something else.
fn key(name: &str, seed: u64, told: &Value) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let hash = Sha256::digest(told.to_string().as_bytes());
    let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{plain:.40}-{seed}-{hash}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Variant>> {
        let job = crate::run::Job::new(String::new(), Vec::new());
        variants(text, &job.experts, &TrainConfig { tokens: 77, ..job.train })
    }

    #[test]
    fn variants_override_the_common_options() {
        let found = parse(
            "[[variant]]\nname = 'a'\nexperts = 8\nbatch_size = 3\n[[variant]]\nname = 'b'\nmethod = 'static'\nlr = 1\n",
        )
        .unwrap();
        assert_eq!((found[0].experts.experts, found[0].train.batch_size, found[0].train.tokens), (8, 3, 77));
        assert_eq!((found[1].name.as_str(), found[1].train.lr), ("b", 1.0));
        assert_eq!(found[1].train.method, crate::train::Method::Static);
        assert_eq!(found[1].experts.experts, 4);
    }

    #[test]
    fn broken_variants_are_named() {
        for (text, word) in [
            ("", "variant"),
            ("[[variant]]\nlr = 1\n", "variant 1: needs a name"),
            ("[[variant]]\nname = 'a'\n[[variant]]\nname = 'a'\n", "used twice"),
            ("[[variant]]\nname = 'a'\nlerning = 1\n", "unknown key \"lerning\""),
            ("[[variant]]\nname = 'a'\nlr = -1\n", "--lr must be"),
            ("[[variant]]\nname = 'a'\nlr = 'x'\n", "variant \"a\""),
            ("[[variant]]\nname = 'a'\nseed = 1\n", "--seeds"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_cell_is_known_by_what_it_was_told() {
        let told = |lr: f64| serde_json::json!({ "lr": lr });
        assert_eq!(key("Static, E=8", 3, &told(0.1)), key("Static, E=8", 3, &told(0.1)));
        assert_ne!(key("a", 3, &told(0.1)), key("a", 3, &told(0.2)));
        assert!(key("Static/E=8", 3, &told(0.1)).starts_with("static-e-8-3-"));
    }
}

//! What a whole run is told, and what it reads.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cli::ExpertArgs;
use crate::curves::spread;
use crate::data::{Batches, DataSource, PaddedBatch, Split};
use crate::texts::{CALIBRATION_TOKENS, TextArgs, Texts, calibration};
use crate::train::{Method, TrainConfig};
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::hub;

/// All that `run` is told.
#[derive(Debug, Clone)]
pub struct Job {
    /// Dense model: a folder or a hub id.
    pub model: String,
    /// Text to train on.
    pub data: Vec<DataSource>,
    /// Text to evaluate on; empty for a held-out part of `data`.
    pub valid: Vec<DataSource>,
    /// How the model is cut.
    pub experts: ExpertArgs,
    /// How it is trained.
    pub train: TrainConfig,
    /// Methods trained alike, for comparison.
    pub baselines: Vec<Method>,
    /// Whether the oracle's curve is searched.
    pub oracle: bool,
    /// Tokens that curves are measured on at most.
    pub eval_tokens: usize,
    /// Minimal pairs.
    pub pairs: Option<PathBuf>,
    /// How text is read.
    pub text: TextArgs,
}

impl Job {
    /// A job with everything else at its default.
    pub fn new(model: String, data: Vec<DataSource>) -> Self {
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            experts: ExpertArgs,
            #[command(flatten)]
            text: TextArgs,
        }
        let defaults = <Defaults as clap::Parser>::parse_from(["defaults"]);
        Self {
            model,
            data,
            valid: Vec::new(),
            experts: defaults.experts,
            train: TrainConfig::default(),
            baselines: Vec::new(),
            oracle: true,
            eval_tokens: 200_000,
            pairs: None,
            text: defaults.text,
        }
    }
}

/// What a job reads, opened and checked before anything is written.
pub struct Inputs {
    pub(super) dense: Checkpoint,
    pub(super) texts: Texts,
    pub(super) batches: Batches,
    pub(super) held_out: Vec<PaddedBatch>,
    pub(super) calibration: Vec<PaddedBatch>,
}

impl Inputs {
    /// Opens the model and the text of `job`.
    ///
    /// # Errors
    /// What is missing, broken or does not fit; options that contradict the model.
    pub fn open(job: &Job) -> Result<Self> {
        job.train.validate()?;
        let dense = Checkpoint::open(&hub::resolve(&job.model)?)?;
        ensure!(
            dense.config().dynamoe.is_none(),
            "{}: is a DynaMoE checkpoint already; `finetune` trains it on, `export --dense` makes a dense one of it",
            dense.dir().display()
        );
        job.experts.options(dense.config(), job.train.seed, false)?;
        let texts = Texts::open(dense.dir(), dense.config(), &job.text)?;
        let shape = (job.train.batch_size, job.train.sequence_length);
        let split = if job.valid.is_empty() { Split::Train } else { Split::All };
        let batches = texts.training(&job.data, split, shape, job.train.seed)?;
        let held_out = texts.held_out(&job.data, &job.valid, job.train.sequence_length)?;
        if let Some(path) = &job.pairs {
            texts.pairs(path)?;
        }
        let held_out = spread(&held_out, job.eval_tokens);
        let calibration = calibration(&batches, CALIBRATION_TOKENS);
        Ok(Self { dense, texts, batches, held_out, calibration })
    }

    /// The folder of the dense model.
    pub fn model_dir(&self) -> &Path {
        self.dense.dir()
    }

    /// All that decides the result of `job`, to be compared when it is resumed.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn describe(&self, job: &Job) -> Result<Value> {
        let mut told = describe(&self.dense, &job.data, &job.train, &job.text)?;
        told["valid"] = describe_sources(&job.valid)?;
        told["experts"] = serde_json::to_value(&job.experts)?;
        told["eval-tokens"] = job.eval_tokens.into();
        Ok(told)
    }
}

/// All that decides the result of training `model`, to be compared when the run is resumed.
///
/// # Errors
/// A file that cannot be read.
pub fn describe(
    model: &Checkpoint,
    data: &[DataSource],
    train: &TrainConfig,
    text: &TextArgs,
) -> Result<Value> {
    let mut told = serde_json::to_value(train)?;
    // how often to save and log does not decide the result
    if let Some(train) = told.as_object_mut() {
        train.retain(|key, _| key != "save-every" && key != "log-every");
    }
    told["model"] = model.fingerprint()?.into();
    told["data"] = describe_sources(data)?;
    told["marker"] = text.marker.as_str().into();
    told["field"] = text.field.as_str().into();
    Ok(told)
}

fn describe_sources(sources: &[DataSource]) -> Result<Value> {
    let describe = |source: &DataSource| -> Result<Value> {
        let path = source.path.display().to_string();
        let bytes = fs::metadata(&source.path).with_context(|| path.clone())?.len();
        Ok(json!({ "path": path, "weight": source.weight, "bytes": bytes }))
    };
    sources.iter().map(describe).collect::<Result<Vec<_>>>().map(Value::from)
}

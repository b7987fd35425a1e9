//! The whole way: calibrate, convert, fine-tune, solve the dial, evaluate, compare, report.
//!
//! `OUT` is the finished checkpoint's folder; `OUT/training` keeps what a resumed run needs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dynamoe::{RouterConfig, RouterKind};

use crate::checkpoint::folder::{StagedFolder, write_atomic};
use crate::checkpoint::writer::{DEFAULT_SHARD_BYTES, save_tensors};
use crate::checkpoint::{Checkpoint, expected_tensors};
use crate::data::{Batches, PaddedBatch};
use crate::evaluate::budget;
use crate::model::RoutedModel;
use crate::results::TrainMetrics;
use crate::train::{Mode, Outcome, TrainConfig, TrainModel, Trainer};

/// Folder of intermediate results within the output.
pub const TRAINING: &str = "training";

/// The output folder of a run.
pub struct RunFolder {
    out: PathBuf,
}

impl RunFolder {
    /// Prepares `out`. `resume` takes up an interrupted run; `force` removes an earlier one.
    ///
    /// # Errors
    /// A folder that is not empty, with neither; a folder that is not this program's; a place that cannot be
    /// written.
    pub fn prepare(out: &Path, force: bool, resume: bool) -> Result<Self> {
        let training = out.join(TRAINING);
        let occupied = match fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(error).with_context(|| format!("{}: cannot be read", out.display())),
        };
        if occupied && !resume {
            ensure!(
                force,
                "{}: the output folder exists and is not empty: choose another, or --resume to continue that run, \
                 or --force to replace it",
                out.display()
            );
            let ours = training.is_dir() || out.join("config.json").is_file();
            ensure!(ours, "{}: not a folder that this program wrote; remove it yourself", out.display());
            fs::remove_dir_all(out).with_context(|| format!("removing {}", out.display()))?;
        }
        fs::create_dir_all(&training)
            .with_context(|| format!("{}: the output folder cannot be created there", out.display()))?;
        Ok(Self { out: out.to_owned() })
    }

    /// The folder of the finished checkpoint.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// A path among the intermediate results.
    pub fn training(&self, name: &str) -> PathBuf {
        self.out.join(TRAINING).join(name)
    }

    /// Moves a finished checkpoint's files into place, config.json last: until then no loader takes the folder
    /// for a model.
    fn publish(&self, staged: &Path) -> Result<()> {
        let mut names: Vec<_> = fs::read_dir(staged)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<std::io::Result<_>>()
            .with_context(|| format!("reading {}", staged.display()))?;
        names.sort_by_key(|name| name == "config.json");
        for name in names {
            let to = self.out.join(&name);
            fs::rename(staged.join(&name), &to).with_context(|| format!("writing {}", to.display()))?;
        }
        fs::File::open(&self.out)?.sync_all()?;
        fs::remove_dir_all(staged).with_context(|| format!("removing {}", staged.display()))
    }
}

/// A fine-tuning job.
pub struct Finetune<'a> {
    /// The converted checkpoint.
    pub source: &'a Checkpoint,
    /// Its dense origin, where distillation asks for it.
    pub teacher: Option<&'a RoutedModel>,
    /// Options.
    pub config: &'a TrainConfig,
    /// Training batches.
    pub batches: &'a Batches,
    /// Where checkpoints and metrics go.
    pub state_dir: Option<&'a Path>,
    /// Set to stop.
    pub stop: &'a AtomicBool,
    /// Where to train.
    pub device: &'a Device,
}

impl Finetune<'_> {
    /// Trains to the end or until asked to stop.
    ///
    /// # Errors
    /// Those of [`Trainer::run`]; tensors that do not fit.
    pub fn run(&self) -> Result<(TrainModel, Outcome, Vec<TrainMetrics>)> {
        let mut config = self.source.config().clone();
        let Some(dynamoe) = &mut config.dynamoe else {
            bail!(
                "{}: a dense model; run `moefy-train convert` first, or `moefy-train run` for all steps",
                self.source.dir().display()
            )
        };
        if !self.config.method.has_router() {
            ensure!(
                self.config.mode == Mode::Full,
                "--mode router needs a method with a router: similarity or priced, found {:?}",
                self.config.method
            );
            dynamoe.router = RouterConfig { kind: RouterKind::Static, hidden_size: 0, ..dynamoe.router.clone() };
        }
        dynamoe.budgets.clear();
        let model = TrainModel::new(&config, self.config, &mut |name, shape| {
            self.source.tensor(name, shape, DType::F32, self.device)
        })?;
        ensure!(!model.params().is_empty(), "nothing to train with these options");
        let (outcome, metrics) = Trainer {
            config: self.config,
            model: &model,
            batches: self.batches,
            teacher: self.teacher,
            state_dir: self.state_dir,
            fingerprint: &self.source.fingerprint()?,
            stop: self.stop,
            label: self.config.method.label(),
        }
        .run()?;
        Ok((model, outcome, metrics))
    }
}

/// Writes a trained model, in the types of the checkpoint that it came from, with its table of budgets solved on
/// `calibration`. Returns the configuration written.
///
/// # Errors
/// The file system's; weights that are not finite.
pub fn publish(
    folder: &RunFolder,
    source: &Checkpoint,
    model: &TrainModel,
    calibration: &[PaddedBatch],
) -> Result<crate::hf_config::ModelConfig> {
    let mut config = model.config().clone();
    let dynamoe = config.dynamoe.as_mut().context("a trained model has a dynamoe section")?;
    dynamoe.budgets = budget::table(&model.routed()?, calibration, &budget::TABLE)?;
    let path = folder.training("final");
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    let staged = StagedFolder::create(&path, false)?;
    copy_companions(source.dir(), staged.path())?;
    let mut tensors = BTreeMap::new();
    for (name, _) in expected_tensors(&config) {
        tensors.insert(name.clone(), model.tensor(&name)?.to_device(&Device::Cpu)?);
    }
    let dtype = |name: &str| source.info(name).map_or(safetensors::Dtype::F32, |info| info.dtype);
    save_tensors(staged.path(), &tensors, dtype, DEFAULT_SHARD_BYTES)?;
    let section = serde_json::to_value(&*dynamoe)?;
    write_atomic(&staged.path().join("config.json"), &with_section(source.dir(), section)?)?;
    staged.commit()?;
    folder.publish(&path)?;
    Ok(config)
}

/// `dir/config.json` with another `dynamoe` section.
///
/// # Errors
/// A config.json that cannot be read.
pub fn with_section(dir: &Path, section: serde_json::Value) -> Result<Vec<u8>> {
    let path = dir.join("config.json");
    let read = || -> Result<serde_json::Value> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
    let mut json = read().with_context(|| format!("reading {}", path.display()))?;
    json["dynamoe"] = section;
    let mut bytes = serde_json::to_vec_pretty(&json)?;
    bytes.push(b'\n');
    Ok(bytes)
}

//! How a model is cut and trained, and the stages that do it: convert, train, publish, measure.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dynamoe::{Budget, RouterConfig, RouterKind};
use dynamoe_model::checkpoint::{float_dtype, save_model};
use dynamoe_model::tensors::expected_tensors;
use dynamoe_model::{Checkpoint, ModelConfig, RoutedModel};
use serde_json::{Value, json};

use super::folder::RunFolder;
use super::lab::Lab;
use crate::data::{Batches, PaddedBatch};
use crate::evaluate::budget::{self, DialScale};
use crate::evaluate::curve::Probe;
use crate::machine::Machine;
use crate::methods::Method;
use crate::prepare::{self, ExpertConfig};
use crate::progress::Progress;
use crate::ranks::Ranks;
use crate::report::results::{Curve, TrainMetrics};
use crate::train::memory::{bytes, options_that_fit};
use crate::train::{Memory, Outcome, Teacher, TrainConfig, TrainModel, Trainer};

/// All that decides a checkpoint besides the model and the text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recipe {
    /// How the model is cut.
    pub experts: ExpertConfig,
    /// How it is trained.
    pub train: TrainConfig,
}

/// What a recipe starts from, as far as its need of memory depends on it.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// Bytes that a dense weight takes on disk.
    pub stored: u64,
    /// Whether the model is measured and converted first.
    pub converts: bool,
    /// Where to compute.
    pub device: &'a Device,
    /// The processes that train together.
    pub ranks: &'a dyn Ranks,
}

impl<'a> Start<'a> {
    /// A lab's model; a dense one is measured and converted.
    pub fn of(lab: &'a Lab<'_>) -> Self {
        let config = lab.model.config();
        let stored = lab.model.dtype().bitsize() as u64 / 8;
        let converts = config.dynamoe.is_none();
        Self { config, stored, converts, device: lab.device, ranks: lab.ranks }
    }

    /// What each process needs to train a model of this configuration.
    fn memory(&self, config: &ModelConfig, train: &TrainConfig) -> Memory {
        let sample = self.converts.then(prepare::sample_limit);
        Memory::of_rank(config, train, self.stored, sample, self.ranks.size())
    }
}

/// What [`Recipe::train`] works with.
pub struct TrainJob<'a> {
    /// The checkpoint to train.
    pub source: &'a Checkpoint,
    /// The dense model to distill from, where [`TrainConfig::needs_other_teacher`]; else the model in training is its own.
    pub teacher: Option<&'a RoutedModel>,
    /// Training batches.
    pub batches: &'a Batches,
    /// Where checkpoints of the training and metrics go.
    pub state_dir: &'a Path,
    /// Shown in front of the progress.
    pub label: &'a str,
    /// The name of its events among those of other trainings, where the lab has a folder for events.
    pub name: &'a str,
}

/// How a training ended.
pub enum Training {
    /// With a trained model and the log of all steps.
    Finished(Box<TrainModel>, Vec<TrainMetrics>),
    /// It was asked to stop; the state after this many steps is saved.
    Stopped(u64),
}

impl Recipe {
    /// Checks the settings, also against the model.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self, config: &ModelConfig) -> Result<()> {
        self.train.validate()?;
        self.experts.options(config, self.train.seed).map(drop)
    }

    /// Says what the recipe needs in memory, and refuses what the machine does not have.
    ///
    /// # Errors
    /// Too little memory, with the options that would do.
    pub fn check_memory(&self, start: &Start<'_>) -> Result<()> {
        let config = self.planned_config(start.config)?;
        let ranks = start.ranks;
        let need = |train: &TrainConfig| start.memory(&config, train);
        let found = need(&self.train);
        // a GPU's memory is not read
        let Some(machine) = Machine::read().filter(|_| start.device.is_cpu()) else {
            tracing::info!("memory: about {found}");
            return Ok(());
        };
        let share = machine.available / ranks.on_this_machine() as u64;
        let each = if ranks.size() > 1 { " for each process" } else { "" };
        let available = bytes(share) + each;
        tracing::info!("memory: about {found}; {available} are available");
        if found.peak() <= share {
            return Ok(());
        }
        let asked = bytes(found.peak());
        match options_that_fit(&self.train, share, |train| need(train).peak()) {
            Some((options, need)) => bail!(
                "about {asked} of memory are needed and {available} are available: {options} needs {}",
                bytes(need)
            ),
            None => bail!(
                "about {asked} of memory are needed and {available} are available: no option of training makes this \
                 model fit; take a smaller one or a larger machine"
            ),
        }
    }

    /// The most memory that each process needs at a time, in bytes.
    ///
    /// # Errors
    /// Experts that do not fit the model.
    pub fn peak(&self, start: &Start<'_>) -> Result<u64> {
        Ok(start.memory(&self.planned_config(start.config)?, &self.train).peak())
    }

    /// The configuration that is trained where training starts from this one.
    fn planned_config(&self, start: &ModelConfig) -> Result<ModelConfig> {
        let mut config = start.clone();
        if start.dynamoe.is_none() && self.train.method != Method::Dense {
            config.dynamoe = Some(self.experts.options(start, self.train.seed)?.section(start));
        }
        Ok(config)
    }

    /// The settings as JSON, without those that do not decide the result.
    ///
    /// # Errors
    /// Never: the settings are plain data.
    pub fn settings(&self) -> Result<Value> {
        let mut train = serde_json::to_value(&self.train)?;
        // how often to save and log does not decide the result
        for (object, key) in [("", "save-every"), ("/tuning", "log-every")] {
            if let Some(settings) = train.pointer_mut(object).and_then(Value::as_object_mut) {
                settings.remove(key);
            }
        }
        Ok(json!({ "train": train, "experts": self.experts }))
    }

    /// Measures the lab's dense model on `calibration` and converts it into `out`, unless that was done before.
    ///
    /// # Errors
    /// A model that cannot be converted; a place that cannot be written.
    pub fn convert(&self, lab: &Lab<'_>, calibration: &[PaddedBatch], out: &Path) -> Result<Checkpoint> {
        lab.ranks.first(|| {
            if out.join("config.json").is_file() {
                return Ok(());
            }
            let measured = prepare::calibrate(&lab.model, calibration)?;
            let options = self.experts.options(lab.model.config(), self.train.seed)?;
            prepare::convert(&lab.model, Some(&measured), &options, out)
        })?;
        Checkpoint::open(out)
    }

    /// Trains a converted checkpoint (or, with [`Method::Dense`], a dense one) to the end or until asked to stop.
    ///
    /// # Errors
    /// Those of [`Trainer::run`]; a model that the method cannot train.
    pub fn train(&self, lab: &Lab<'_>, job: &TrainJob<'_>) -> Result<Training> {
        let model = TrainModel::new(&self.trained_config(job.source)?, &self.train, &mut |name, shape| {
            let stored = job.source.info(name).and_then(|info| float_dtype(info.dtype));
            job.source.tensor(name, shape, stored.unwrap_or(DType::F32), lab.device)
        })?;
        ensure!(!model.params().is_empty(), "nothing to train with these options");
        let teacher = job.teacher.map_or(Teacher::Itself, Teacher::Other);
        let (outcome, metrics) = Trainer {
            config: &self.train,
            model: &model,
            batches: job.batches,
            teacher: self.train.has_teacher().then_some(teacher),
            state_dir: Some(job.state_dir),
            events: lab.tensorboard.as_ref().map(|dir| dir.join(job.name)),
            fingerprint: &job.source.fingerprint()?,
            stop: lab.stop,
            label: job.label,
            ranks: lab.ranks,
        }
        .run()?;
        Ok(match outcome {
            Outcome::Finished => Training::Finished(Box::new(model), metrics),
            Outcome::Stopped(step) => Training::Stopped(step),
        })
    }

    /// Refuses a checkpoint that the method cannot train.
    ///
    /// # Errors
    /// A dense model, where the method needs a converted one.
    pub fn check_source(&self, source: &Checkpoint) -> Result<()> {
        self.trained_config(source).map(drop)
    }

    /// The configuration in which the method trains `source`: with its router, or with static routing.
    fn trained_config(&self, source: &Checkpoint) -> Result<ModelConfig> {
        let mut config = source.config().clone();
        match &mut config.dynamoe {
            Some(section) => {
                if !self.train.method.has_router() {
                    section.router =
                        RouterConfig { kind: RouterKind::Static, hidden_size: 0, ..section.router.clone() };
                }
                section.budgets.clear();
            }
            None if self.train.method == Method::Dense => {}
            None => bail!(
                "{}: a dense model; run `moefy-train convert` first, or `moefy-train run` for all steps",
                source.dir().display()
            ),
        }
        Ok(config)
    }

    /// Loss against width of a trained model, on held-out text.
    ///
    /// # Errors
    /// No text to measure on.
    pub fn measure(
        &self,
        model: &RoutedModel,
        held_out: &[PaddedBatch],
        widths: &[f64],
        ranks: &dyn Ranks,
    ) -> Result<Curve> {
        let seed = self.train.seed;
        self.train.method.curve(&Probe { model, batches: held_out, widths, seed, ranks })
    }
}

/// A trained model on its way to a checkpoint.
pub struct Publication<'a> {
    /// The checkpoint that training started from: its types and shards are kept.
    pub source: &'a Checkpoint,
    /// The trained weights.
    pub model: &'a TrainModel,
    /// The method that trained them.
    pub method: Method,
    /// Text on which the dial is solved.
    pub calibration: &'a [PaddedBatch],
    /// Who solves it.
    pub ranks: &'a dyn Ranks,
}

impl Publication<'_> {
    /// Scales the dial, solves the table of budgets and puts the checkpoint into `folder`. Returns the model as it was
    /// written.
    ///
    /// Routers trained with a price have their scores rescaled first, so that the dial's range is that of the widths: see
    /// [`budget::Solved::scale`].
    ///
    /// # Errors
    /// The file system's; weights that are not finite.
    pub fn publish(&self, folder: &RunFolder<'_>) -> Result<RoutedModel> {
        let rescale = self.method.rescales_dial();
        let model = self.model.routed()?;
        let solved = budget::solve(&model, self.calibration, &budget::TABLE, rescale, self.ranks)?;
        drop(model);
        match solved.scale {
            Some(DialScale { scale, shift }) => self.model.rescale_routers(scale, shift)?,
            None if rescale => {
                tracing::warn!("the routers know few widths: the dial keeps the scale it was trained with")
            }
            None => {}
        }
        let config = self.config(solved.table)?;
        let path = folder.training("final");
        self.ranks.first(|| {
            write_model(self.source, self.model, &config, &path)?;
            folder.publish(&path)
        })?;
        self.routed(&config)
    }

    /// The model's configuration with a table of budgets, solved for `widths`.
    ///
    /// # Errors
    /// A model without a `dynamoe` section.
    pub fn with_budgets(&self, widths: &[f64]) -> Result<ModelConfig> {
        let model = self.model.routed()?;
        self.config(budget::solve(&model, self.calibration, widths, false, self.ranks)?.table)
    }

    fn config(&self, budgets: Vec<Budget>) -> Result<ModelConfig> {
        let mut config = self.model.config().clone();
        config.dynamoe.as_mut().context("a trained model has a dynamoe section")?.budgets = budgets;
        Ok(config)
    }

    /// The trained model as it is served, under a configuration of its dial.
    ///
    /// # Errors
    /// Tensors that do not fit.
    pub fn routed(&self, config: &ModelConfig) -> Result<RoutedModel> {
        RoutedModel::from_tensors(config, &mut |name, _| self.model.in_f32(name))
    }
}

/// Writes a trained model as the new folder `out`, in the types of the checkpoint that it came from.
///
/// # Errors
/// The file system's; weights that are not finite.
pub fn write_model(source: &Checkpoint, model: &TrainModel, config: &ModelConfig, out: &Path) -> Result<()> {
    if out.exists() {
        fs::remove_dir_all(out).with_context(|| format!("removing {}", out.display()))?;
    }
    let mut weights = BTreeMap::new();
    for (name, _) in expected_tensors(config) {
        let tensor = model.tensor(&name)?.to_device(&Device::Cpu)?;
        weights.insert(name, tensor);
    }
    let bytes = source.names().filter_map(|name| source.info(name)).map(|info| info.len as u64).sum();
    let progress = Progress::new("writing the checkpoint", "bytes", bytes, 0);
    save_model(source, &weights, config.dynamoe.as_ref(), out, &mut |bytes| progress.add(bytes))?;
    progress.finish();
    Ok(())
}

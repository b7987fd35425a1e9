//! The whole way: calibrate, convert, fine-tune, solve the dial, evaluate, compare, report.
//!
//! `OUT` is the finished checkpoint's folder; `OUT/training` keeps what a resumed run needs.

mod folder;
mod job;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dynamoe::{RouterConfig, RouterKind};

use crate::cli::measure;
use crate::convert::convert;
use crate::curves::{WIDTHS, curve, oracle_curve, samples};
use crate::data::{Batches, PaddedBatch};
use crate::evaluate::cost::Cost;
use crate::evaluate::{Dial, Setting, budget, pairs_point, point};
use crate::results::{Curve, PairsPoint, Report, Sample, TrainMetrics};
use crate::texts::Texts;
use crate::train::{Method, Outcome, TrainConfig, TrainModel, Trainer};
use dynamoe_model::checkpoint::{Checkpoint, save_model, write_atomic};
use dynamoe_model::config::ModelConfig;
use dynamoe_model::model::RoutedModel;
use dynamoe_model::tensors::expected_tensors;

pub use folder::{Existing, RunFolder, TRAINING};
pub use job::{Inputs, Job, describe};

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
            dynamoe.router =
                RouterConfig { kind: RouterKind::Static, hidden_size: 0, ..dynamoe.router.clone() };
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
/// `calibration`. Routers trained with a price have their scores rescaled first, so that the dial's range is
/// that of the widths (see [`budget::dial_scale`]). Returns the model as it was written.
///
/// # Errors
/// The file system's; weights that are not finite.
pub fn publish(
    folder: &RunFolder,
    source: &Checkpoint,
    model: &TrainModel,
    method: Method,
    calibration: &[PaddedBatch],
) -> Result<RoutedModel> {
    if method == Method::Priced {
        match budget::dial_scale(&model.routed()?, calibration)? {
            Some((scale, shift)) => model.rescale_routers(scale, shift)?,
            None => {
                tracing::warn!("the routers know few widths: the dial keeps the scale it was trained with")
            }
        }
    }
    let config = with_budgets(model, calibration, &budget::TABLE)?;
    let path = folder.training("final");
    write(source, model, &config, &path)?;
    folder.publish(&path)?;
    routed(model, &config)
}

/// The model's configuration with a table of budgets, solved for `widths` on `calibration`.
///
/// # Errors
/// A model without a dynamoe section; candle's.
pub fn with_budgets(model: &TrainModel, calibration: &[PaddedBatch], widths: &[f64]) -> Result<ModelConfig> {
    let mut config = model.config().clone();
    let dynamoe = config.dynamoe.as_mut().context("a trained model has a dynamoe section")?;
    dynamoe.budgets = budget::table(&model.routed()?, calibration, widths)?;
    Ok(config)
}

/// The trained model as it is served, under another configuration of its dial.
///
/// # Errors
/// Tensors that do not fit.
pub fn routed(model: &TrainModel, config: &ModelConfig) -> Result<RoutedModel> {
    RoutedModel::from_tensors(config, &mut |name, _| model.tensor(name))
}

/// Writes a trained model as the new folder `out`, in the types of the checkpoint that it came from.
///
/// # Errors
/// The file system's; weights that are not finite.
pub fn write(source: &Checkpoint, model: &TrainModel, config: &ModelConfig, out: &Path) -> Result<()> {
    if out.exists() {
        fs::remove_dir_all(out).with_context(|| format!("removing {}", out.display()))?;
    }
    let mut weights = BTreeMap::new();
    for (name, _) in expected_tensors(config) {
        let tensor = model.tensor(&name)?.to_device(&Device::Cpu)?;
        weights.insert(name, tensor);
    }
    save_model(source, &weights, config.dynamoe.as_ref(), out, false)
}

/// A running job: what its steps share.
struct Running<'a> {
    job: &'a Job,
    folder: &'a RunFolder,
    device: &'a Device,
    stop: &'a AtomicBool,
    texts: Texts,
    batches: Batches,
    held_out: Vec<PaddedBatch>,
    calibration: Vec<PaddedBatch>,
}

/// Runs all steps of `job`. A step whose result is in the folder already is not repeated.
///
/// # Errors
/// Those of the steps.
pub fn run_job(
    job: &Job,
    inputs: Inputs,
    folder: &RunFolder,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let started = Instant::now();
    let Inputs { dense, texts, batches, held_out, calibration } = inputs;
    let run = Running { job, folder, device, stop, texts, batches, held_out, calibration };

    let converted = run.convert(&dense)?;
    let teacher = RoutedModel::load(&dense, device)?;
    let layers = dense.config().num_hidden_layers;
    let dense_loss = point(&teacher, &run.held_out, &Setting::uniform(1.0, layers))?.loss;
    let state = folder.training("state");
    let (model, outcome, metrics) = run.train(&converted, &teacher, &job.train, &state)?;
    if outcome != Outcome::Finished {
        return Ok(outcome);
    }
    tracing::info!("solving the dial on training text");
    let routed = publish(folder, &converted, &model, job.train.method, &run.calibration)?;
    tracing::info!("measuring the curve on held-out text");
    let mut report = Report {
        title: run.title(),
        dense_loss: Some(dense_loss),
        curves: vec![curve(&routed, job.train.method, &run.held_out, job.train.seed, &WIDTHS)?],
        training: vec![(job.train.method.label().to_owned(), metrics)],
        samples: run.samples(&routed)?,
        pairs: run.pairs(&routed)?,
        ..Report::default()
    };
    run.facts(&mut report, &dense, started);
    crate::report::write(&report, folder.out())?;
    if job.oracle && job.train.method.has_router() {
        tracing::info!("searching for the oracle's routes");
        report.curves.push(oracle_curve(&model, &run.held_out)?);
    }
    drop(model);
    for &method in &job.baselines {
        let Some((curve, metrics)) = run.baseline(method, &converted, &teacher)? else {
            return Ok(Outcome::Stopped(job.train.steps()));
        };
        if method == Method::Dense {
            report.dense_finetuned_loss = curve.points.first().map(|point| point.loss);
        }
        report.curves.push(curve);
        report.training.push((method.label().to_owned(), metrics));
    }
    run.facts(&mut report, &dense, started);
    crate::report::write(&report, folder.out())?;
    Ok(Outcome::Finished)
}

impl Running<'_> {
    /// The converted checkpoint, made now unless it is there.
    fn convert(&self, dense: &Checkpoint) -> Result<Checkpoint> {
        let converted = self.folder.training("converted");
        if !converted.join("config.json").is_file() {
            let measured = measure(dense, &self.calibration)?;
            let options = self.job.experts.options(dense.config(), self.job.train.seed, false)?;
            convert(dense, Some(&measured), &options, &converted)?;
        }
        Checkpoint::open(&converted)
    }

    fn train(
        &self,
        source: &Checkpoint,
        teacher: &RoutedModel,
        config: &TrainConfig,
        state: &Path,
    ) -> Result<(TrainModel, Outcome, Vec<TrainMetrics>)> {
        Finetune {
            source,
            teacher: config.has_teacher().then_some(teacher),
            config,
            batches: &self.batches,
            state_dir: Some(state),
            stop: self.stop,
            device: self.device,
        }
        .run()
    }

    /// A baseline's curve and training log, trained now unless they are there; none if asked to stop.
    fn baseline(
        &self,
        method: Method,
        source: &Checkpoint,
        teacher: &RoutedModel,
    ) -> Result<Option<(Curve, Vec<TrainMetrics>)>> {
        let done = self.folder.training(&format!("{method:?}.json").to_lowercase());
        if let Ok(bytes) = fs::read(&done) {
            return serde_json::from_slice(&bytes).with_context(|| format!("reading {}", done.display()));
        }
        let config = TrainConfig { method, ..self.job.train.clone() };
        let state = self.folder.training(&format!("{method:?}-state").to_lowercase());
        let (model, outcome, metrics) = self.train(source, teacher, &config, &state)?;
        if outcome != Outcome::Finished {
            return Ok(None);
        }
        let curve = curve(&model.routed()?, method, &self.held_out, config.seed, &WIDTHS)?;
        write_atomic(&done, &serde_json::to_vec(&(&curve, &metrics))?)?;
        fs::remove_dir_all(&state).with_context(|| format!("removing {}", state.display()))?;
        Ok(Some((curve, metrics)))
    }

    fn settings(&self, model: &RoutedModel, widths: &[f64]) -> Result<Vec<Setting>> {
        widths.iter().map(|&width| Setting::of(Dial::Budget(width), model)).collect()
    }

    fn samples(&self, model: &RoutedModel) -> Result<Vec<Sample>> {
        let settings = self.settings(model, &[0.35, 0.5, 0.65, 0.8, 1.0])?;
        samples(model, &self.texts, &self.held_out, &settings, 2, 160)
    }

    fn pairs(&self, model: &RoutedModel) -> Result<Vec<PairsPoint>> {
        let Some(path) = &self.job.pairs else { return Ok(Vec::new()) };
        let pairs = self.texts.pairs(path)?;
        let settings = self.settings(model, &[0.35, 0.5, 0.75, 1.0])?;
        settings.iter().map(|setting| pairs_point(model, &pairs, setting)).collect()
    }

    fn title(&self) -> String {
        let path = Path::new(&self.job.model);
        let name = path.file_name().map_or_else(|| self.job.model.clone(), |n| n.to_string_lossy().into());
        format!("DynaMoE of {name}")
    }

    fn facts(&self, report: &mut Report, dense: &Checkpoint, started: Instant) {
        let config = dense.config();
        let train = &self.job.train;
        let tokens = train.steps() * train.tokens_per_step();
        let sources: Vec<String> = self.job.data.iter().map(|s| s.path.display().to_string()).collect();
        let scored: usize =
            self.held_out.iter().map(|b| b.weights.iter().filter(|&&w| w > 0.0).count()).sum();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        report.facts = [
            ("Base model", format!("{} ({:?})", self.job.model, config.architecture)),
            ("Parameters", format!("{:.0}", Cost::of(config).dense_parameters())),
            ("Layers × FFN width", format!("{} × {}", config.num_hidden_layers, config.intermediate_size)),
            ("Training text", sources.join(", ")),
            ("Tokens trained", format!("{tokens} in {} steps", train.steps())),
            ("Held-out tokens", scored.to_string()),
            ("Seed", train.seed.to_string()),
            ("Time so far", format!("{:.0} s on {threads} processors", started.elapsed().as_secs_f64())),
        ]
        .map(|(label, value)| (label.to_owned(), value))
        .to_vec();
    }
}

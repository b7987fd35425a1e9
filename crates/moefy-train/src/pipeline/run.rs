//! The whole way for one model: convert, train, publish, measure, compare with baselines, report.
//!
//! `OUT` is the finished checkpoint's folder; `OUT/training` keeps what a resumed run needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dynamoe::Dial;
use dynamoe_model::checkpoint::write_atomic;
use dynamoe_model::{Checkpoint, RoutedModel};
use serde_json::Value;

use super::folder::RunFolder;
use super::lab::Lab;
use super::own_text::{OWN_TEXT, write_own_text};
use super::recipe::{Publication, Recipe, Start, TrainJob, Training};
use crate::data::{Batches, DataSource, PaddedBatch, Pairs};
use crate::evaluate::cost::Cost;
use crate::evaluate::curve::{WIDTHS, oracle_curve};
use crate::evaluate::samples::{SampleLimits, samples};
use crate::evaluate::{Setting, pairs_point, point, scored_tokens};
use crate::machine;
use crate::methods::Method;
use crate::progress::Progress;
use crate::ranks::Alone;
use crate::report;
use crate::report::results::{Curve, PairsPoint, Report, Sample, TrainMetrics};
use crate::train::Outcome;
use crate::train::memory::bytes;

/// Tokens on which curves are measured at most, where no number is given. Measuring must stay cheap beside training.
pub const EVAL_TOKENS: usize = 20_000;

/// What a run makes, besides its checkpoint, for the report.
#[derive(Debug, Clone)]
pub struct ReportOptions {
    /// Methods trained alike, for comparison.
    pub baselines: Vec<Method>,
    /// Whether the oracle's curve is searched.
    pub oracle: bool,
    /// Tokens that curves are measured on at most.
    pub eval_tokens: usize,
    /// Minimal pairs to score.
    pub pairs: Option<PathBuf>,
}

/// A run that was checked, before its text is read.
pub struct PlannedRun<'a> {
    lab: Lab<'a>,
    recipe: Recipe,
    options: ReportOptions,
}

/// A run, its inputs opened and checked.
pub struct Run<'a> {
    lab: Lab<'a>,
    recipe: Recipe,
    options: ReportOptions,
    batches: Batches,
    held_out: Vec<PaddedBatch>,
    calibration: Vec<PaddedBatch>,
    pairs: Option<Pairs>,
}

impl<'a> PlannedRun<'a> {
    /// Checks the settings against the model.
    ///
    /// # Errors
    /// Settings that contradict each other or the model; too little memory.
    pub fn new(lab: Lab<'a>, recipe: Recipe, options: ReportOptions) -> Result<Self> {
        recipe.train.validate()?;
        recipe.train.set_precision(lab.device)?;
        ensure!(
            lab.model.config().dynamoe.is_none(),
            "{}: is a DynaMoE checkpoint already; `finetune` trains it on, `export --dense` makes a dense one of it",
            lab.model.dir().display()
        );
        recipe.validate(lab.model.config())?;
        recipe.check_memory(&Start::of(&lab))?;
        Ok(Self { lab, recipe, options })
    }

    /// The folder of the dense model.
    pub fn model_dir(&self) -> &Path {
        self.lab.model.dir()
    }

    /// All that decides the result, to be compared when the run is resumed.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn settings(&self) -> Result<Value> {
        let mut settings = self.lab.settings()?;
        settings["recipe"] = self.recipe.settings()?;
        settings["eval-tokens"] = self.options.eval_tokens.into();
        Ok(settings)
    }

    /// Whether the model has to write text before it can be read.
    pub fn writes_text(&self) -> bool {
        self.lab.own_text.is_some()
    }

    /// Lets the model write the text that is planned into the folder of the run.
    ///
    /// # Errors
    /// Those of [`write_own_text`].
    pub fn write_text(&mut self, folder: &RunFolder<'_>) -> Result<()> {
        write_own_text(&mut self.lab, None, &folder.training(OWN_TEXT))
    }

    /// Reads all that the run needs.
    ///
    /// # Errors
    /// What is missing, broken or does not fit.
    pub fn read(self) -> Result<Run<'a>> {
        let Self { lab, recipe, options } = self;
        recipe.train.set_precision(lab.device)?; // text may have been written since it was checked
        let batches = lab.batches(&recipe.train)?;
        let held_out = lab.held_out(recipe.train.sequence_length, options.eval_tokens)?;
        let pairs = options.pairs.as_deref().map(|path| lab.texts.pairs(path)).transpose()?;
        let calibration = Lab::calibration(&batches);
        Ok(Run { lab, recipe, options, batches, held_out, calibration, pairs })
    }
}

impl Run<'_> {
    /// Runs all stages. A stage whose result is in the folder already is not repeated.
    ///
    /// # Errors
    /// Those of the stages.
    pub fn run(self, folder: &RunFolder<'_>) -> Result<Outcome> {
        let started = Instant::now();
        let converted = self.recipe.convert(&self.lab, &self.calibration, &folder.training("converted"))?;
        let dense_loss = self.dense_loss()?;

        let method = self.recipe.train.method;
        let state = folder.training("state");
        let (model, metrics) = match self.train(&self.recipe, &converted, &state)? {
            Training::Finished(model, metrics) => (model, metrics),
            Training::Stopped(step) => return Ok(Outcome::Stopped(step)),
        };
        let ranks = self.lab.ranks;
        let publication =
            Publication { source: &converted, model: &model, method, calibration: &self.calibration, ranks };
        let routed = publication.publish(folder)?;

        let mut report = Report {
            title: self.title(),
            dense_loss: Some(dense_loss),
            curves: vec![self.recipe.measure(&routed, &self.held_out, &WIDTHS, ranks)?],
            training: vec![(method.label().to_owned(), metrics)],
            ..Report::default()
        };
        // the other ranks need no report: they wait for the next training
        ranks.first(|| {
            report.samples = self.samples(&routed)?;
            report.pairs = self.score_pairs(&routed)?;
            self.write(&mut report, folder, started)?;
            if self.options.oracle && method.has_router() {
                report.curves.push(oracle_curve(&model.routed()?, &model.detached_ffns()?, &self.held_out)?);
            }
            Ok(())
        })?;
        drop(model);
        for &baseline in &self.options.baselines {
            let Some((curve, metrics)) = self.baseline(baseline, &converted, folder)? else {
                return Ok(Outcome::Stopped(self.recipe.train.steps()));
            };
            if baseline == Method::Dense {
                report.dense_finetuned_loss = curve.points.first().map(|point| point.loss);
            }
            report.curves.push(curve);
            report.training.push((baseline.label().to_owned(), metrics));
        }
        ranks.first(|| self.write(&mut report, folder, started))?;
        if let Some(peak) = machine::peak() {
            tracing::info!("memory: {} at most", bytes(peak));
        }
        Ok(Outcome::Finished)
    }

    fn dense_loss(&self) -> Result<f64> {
        let dense = self.lab.teacher()?;
        let full = Setting::uniform(1.0, dense.config().num_hidden_layers);
        let progress = Progress::new("measuring the dense model", "tokens", scored_tokens(&self.held_out), 0);
        let loss = point(&dense, &self.held_out, &full, &progress, self.lab.ranks)?.loss;
        progress.finish();
        Ok(loss)
    }

    fn train(&self, recipe: &Recipe, source: &Checkpoint, state_dir: &Path) -> Result<Training> {
        let teacher = recipe.train.needs_other_teacher().then(|| self.lab.teacher()).transpose()?;
        let method = recipe.train.method;
        let job = TrainJob {
            source,
            teacher: teacher.as_ref(),
            batches: &self.batches,
            state_dir,
            label: method.label(),
            name: method.name(),
        };
        recipe.train(&self.lab, &job)
    }

    /// A baseline's curve and training log, trained now unless they are there; none if asked to stop.
    fn baseline(
        &self,
        method: Method,
        source: &Checkpoint,
        folder: &RunFolder<'_>,
    ) -> Result<Option<(Curve, Vec<TrainMetrics>)>> {
        let done = folder.training(&format!("{method}.json"));
        if self.lab.ranks.as_first(done.is_file()) {
            let bytes = fs::read(&done).with_context(|| format!("reading {}", done.display()))?;
            return serde_json::from_slice(&bytes).with_context(|| format!("reading {}", done.display()));
        }
        let recipe = Recipe { train: self.recipe.train.by(method), ..self.recipe.clone() };
        let state = folder.training(&format!("{method}-state"));
        let Training::Finished(model, metrics) = self.train(&recipe, source, &state)? else {
            return Ok(None);
        };
        let curve = recipe.measure(&model.routed()?, &self.held_out, &WIDTHS, self.lab.ranks)?;
        self.lab.ranks.first(|| {
            write_atomic(&done, &serde_json::to_vec(&(&curve, &metrics))?)?;
            fs::remove_dir_all(&state).with_context(|| format!("removing {}", state.display()))
        })?;
        Ok(Some((curve, metrics)))
    }

    fn budgets(&self, model: &RoutedModel, widths: &[f64]) -> Result<Vec<Setting>> {
        widths.iter().map(|&width| Setting::of(Dial::Budget(width), model)).collect()
    }

    fn samples(&self, model: &RoutedModel) -> Result<Vec<Sample>> {
        let settings = self.budgets(model, &[0.35, 0.5, 0.65, 0.8, 1.0])?;
        let limits = SampleLimits { texts: 2, tokens: 160 };
        samples(model, &self.lab.texts, &self.held_out, &settings, limits)
    }

    fn score_pairs(&self, model: &RoutedModel) -> Result<Vec<PairsPoint>> {
        let Some(pairs) = &self.pairs else { return Ok(Vec::new()) };
        let settings = self.budgets(model, &[0.35, 0.5, 0.75, 1.0])?;
        settings.iter().map(|setting| pairs_point(model, pairs, setting, &Alone)).collect()
    }

    fn title(&self) -> String {
        format!("DynaMoE of {}", model_name(&self.lab.inputs.model))
    }

    /// Writes the report as it is now.
    fn write(&self, report: &mut Report, folder: &RunFolder<'_>, started: Instant) -> Result<()> {
        report.facts = self.facts(started);
        report::write(report, folder.out()).map(drop)
    }

    fn facts(&self, started: Instant) -> Vec<(String, String)> {
        let config = self.lab.model.config();
        let train = &self.recipe.train;
        let tokens = train.steps() * train.tokens_per_step();
        let sources: Vec<String> = self.lab.inputs.data.iter().map(DataSource::name).collect();
        let scored: usize =
            self.held_out.iter().map(|b| b.weights.iter().filter(|&&w| w > 0.0).count()).sum();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        [
            ("Base model", format!("{} ({:?})", self.lab.inputs.model, config.architecture)),
            ("Parameters", format!("{:.0}", Cost::of(config).dense_parameters())),
            ("Layers × FFN width", format!("{} × {}", config.num_hidden_layers, config.intermediate_size)),
            ("Training text", sources.join(", ")),
            ("Tokens trained", format!("{tokens} in {} steps", train.steps())),
            ("Held-out tokens", scored.to_string()),
            ("Seed", train.seed.to_string()),
            ("Time so far", format!("{:.0} s on {threads} processors", started.elapsed().as_secs_f64())),
        ]
        .map(|(label, value)| (label.to_owned(), value))
        .to_vec()
    }
}

/// A model's name for titles: the last part of its path or hub id.
pub(super) fn model_name(model: &str) -> String {
    Path::new(model).file_name().map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into())
}

//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Error, Result, anyhow, ensure};

use super::config::{MomentBits, TrainConfig};
use super::group::Group;
use super::metrics_log::MetricsLog;
use super::model::TrainModel;
use super::optimizer::{AdamW, Update};
use super::shards::Shards;
use super::share::share as share_weights;
use super::state::{self, Place, Saved};
use super::step::{StepBatch, StepContext, StepLoss};
use super::stop::Stop;
use super::sum::GradientSum;
use super::teacher::Teacher;
use super::watch::Watch;
use crate::data::{Batch, Batches};
use crate::methods::Objective;
use crate::progress::{Progress, time};
use crate::ranks::Ranks;
use crate::report::results::TrainMetrics;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Asked to stop; the state after this many steps is saved.
    Stopped(u64),
}

/// Steps after which the time for all of them is told.
const TIMED_STEPS: u64 = 3;

/// A training run.
pub struct Trainer<'a> {
    /// Settings.
    pub config: &'a TrainConfig,
    /// The weights.
    pub model: &'a TrainModel,
    /// Batches, a function of their number.
    pub batches: &'a Batches,
    /// The dense model, where its predictions are a target.
    pub teacher: Option<Teacher<'a>>,
    /// Folder of checkpoints and metrics; none keeps neither.
    pub state_dir: Option<&'a Path>,
    /// Folder of event files for TensorBoard; none for no such files.
    pub events: Option<PathBuf>,
    /// Of the model that training starts from.
    pub fingerprint: &'a str,
    /// Asked to stop, training ends after the step at hand.
    pub stop: &'a Stop,
    /// Shown in front of the progress.
    pub label: &'a str,
    /// The processes that train together. All have the same of everything else.
    pub ranks: &'a dyn Ranks,
}

/// What changes while a training runs, besides the weights.
struct Running {
    shards: Shards,
    optimizer: AdamW,
    gradients: GradientSum,
    objective: Box<dyn Objective>,
    /// Steps of the newest checkpoint.
    saved: Option<u64>,
}

/// What one optimizer step reports: means over its batches.
#[derive(Default)]
struct StepReport {
    loss: f64,
    objective: f64,
    mean_width: f64,
    grad_norm: f64,
}

impl StepReport {
    /// Adds a batch's losses, each times `share`.
    fn add(&mut self, loss: &StepLoss, share: f64) {
        self.objective += share * loss.objective;
        self.loss += share * loss.language_model;
        self.mean_width +=
            share * loss.widths.iter().map(|&w| f64::from(w)).sum::<f64>() / loss.widths.len() as f64;
    }
}

impl Trainer<'_> {
    /// Runs to the end, from the newest checkpoint if there is one. Returns the metrics of the whole run.
    ///
    /// # Errors
    /// A loss that is not finite, with the step, the batch and the last good checkpoint; those of the file
    /// system.
    pub fn run(&self) -> Result<(Outcome, Vec<TrainMetrics>)> {
        self.config.validate()?;
        self.config.check_ranks(self.ranks.size(), self.model.device())?;
        self.config.set_precision(self.model.device())?;
        ensure!(
            self.config.moment_bits == MomentBits::Bits32 || self.model.device().is_cpu(),
            "--moment-bits 8 is for --device cpu: leave it out with --device cuda"
        );
        let _training = self.stop.training();
        let shards = Shards::new(self.model.params(), self.ranks.size());
        let mut running = Running {
            optimizer: AdamW::of_shard(
                self.model.params(),
                &shards,
                self.ranks.rank(),
                self.config.moment_bits,
            )?,
            shards,
            gradients: GradientSum::default(),
            objective: self.config.method.objective(&self.config.routing(self.model.config().width_shares())),
            saved: None,
        };
        // where losses are told at checkpoints, before a checkpoint changes the weights
        let watch = self.state_dir.filter(|_| self.ranks.is_first());
        let watch = watch.map(|_| Watch::start(self.model, self.config, self.batches)).transpose()?;
        if let Some(place) = self.place() {
            running.saved = state::restore(place, self.saved(&mut running))?;
        }
        let (start, steps) = (running.saved.unwrap_or(0), self.config.steps());
        self.check_start(start)?;
        let [kept, events] =
            [self.state_dir, self.events.as_deref()].map(|dir| dir.filter(|_| self.ranks.is_first()));
        let mut log = MetricsLog::open(kept, events, start)?;
        let tokens = self.config.tokens_per_step();
        let progress = Progress::new(self.label, "tokens", steps * tokens, start * tokens);
        let mut rate = Rate::new(start);
        for step in start..steps {
            let report = self.step(step, &mut running)?;
            let done = step + 1;
            let StepReport { loss, mean_width, .. } = report;
            progress.update(done * tokens, format!("step {done}, loss {loss:.3}, width {mean_width:.2}"));
            if done % self.config.tuning.log_every == 0 || done == steps {
                log.push(self.metrics(&report, done, rate.steps_per_second(done)))?;
            }
            if done == start + TIMED_STEPS && done < steps {
                let seconds = progress.seconds_for((steps - start) * tokens);
                tracing::info!("{}: about {} for all steps", self.label, time(seconds));
            }
            let stop = self.ranks.any(self.stop.is_asked());
            if done % self.config.save_every == 0 || done == steps || stop {
                self.save(&mut log, &mut running)?;
                watch.iter().try_for_each(|watch| watch.check(self.model, self.config, done))?;
            }
            if stop && done < steps {
                progress.finish();
                return Ok((Outcome::Stopped(done), log.metrics));
            }
        }
        progress.finish();
        Ok((Outcome::Finished, log.metrics))
    }

    fn metrics(&self, report: &StepReport, done: u64, steps_per_second: f64) -> TrainMetrics {
        let tokens_per_step = self.config.tokens_per_step();
        TrainMetrics {
            step: done,
            tokens: done * tokens_per_step,
            loss: report.loss,
            objective: report.objective,
            mean_width: report.mean_width,
            grad_norm: report.grad_norm,
            lr: self.config.lr * self.config.lr_share(done - 1),
            tokens_per_second: steps_per_second * tokens_per_step as f64,
        }
    }

    /// All that a checkpoint of the training holds.
    fn saved<'a>(&'a self, running: &'a mut Running) -> Saved<'a> {
        Saved {
            params: self.model.params(),
            optimizer: &mut running.optimizer,
            objective: running.objective.as_mut(),
        }
    }

    fn save(&self, log: &mut MetricsLog, running: &mut Running) -> Result<()> {
        let Some(place) = self.place() else { return Ok(()) };
        log.sync()?;
        state::save(place, &self.saved(running))?;
        running.saved = Some(running.optimizer.step);
        Ok(())
    }

    /// Where checkpoints go, if they are kept.
    fn place(&self) -> Option<Place<'_>> {
        let (config, fingerprint, ranks) = (self.config, self.fingerprint, self.ranks);
        self.state_dir.map(|dir| Place { dir, config, fingerprint, ranks })
    }

    /// Refuses ranks that have found different checkpoints.
    fn check_start(&self, start: u64) -> Result<()> {
        let found: Vec<f64> = self.ranks.all_gather(&[start as f64]).concat();
        ensure!(
            found.iter().all(|&step| step == start as f64),
            "the processes found checkpoints of different steps, {found:?}: all of them must see the same --out folder"
        );
        Ok(())
    }

    /// One optimizer step: the gradients of its batches, then the update. The ranks take the batches in turn.
    fn step(&self, step: u64, running: &mut Running) -> Result<StepReport> {
        let (params, ranks) = (self.model.params(), self.ranks);
        let numbers = (0..self.config.accumulation()).map(|micro| self.batch_number(step, micro));
        let batches: Vec<Batch> = numbers.map(|number| self.batches.batch(number)).collect();
        let share = 1.0 / batches.len() as f64;
        let mut report = StepReport::default();
        // all tokens of a step that count have the same weight, whatever batch they are in
        let counted = share * batches.iter().map(Batch::counted).sum::<usize>().max(1) as f64;
        running.gradients.clear(ranks);
        let mut losses = Vec::with_capacity(batches.len());
        for (number, turn) in batches.chunks(ranks.size()).enumerate() {
            for loss in self.turn(step, number * ranks.size(), turn, counted, running)? {
                if !loss.objective.is_finite() {
                    return Err(self.diverged("loss", loss.objective, step, running.saved));
                }
                report.add(&loss, share);
                losses.push(loss);
            }
            running.gradients.add(ranks, &running.shards, params, turn.len())?;
        }
        // not before: batches of one step may be computed at the same time
        losses.iter().for_each(|loss| running.objective.observe(&loss.dials, &loss.widths));
        let squares = ranks.all_gather(&running.gradients.sum.squares(params)?);
        report.grad_norm = share * squares.iter().flatten().sum::<f64>().sqrt();
        if !report.grad_norm.is_finite() {
            return Err(self.diverged("gradient's norm", report.grad_norm, step, running.saved));
        }
        let update = self.update(step, share, report.grad_norm);
        running.optimizer.update(params, &running.gradients.sum, update)?;
        share_weights(ranks, &running.shards, params)?;
        Ok(report)
    }

    /// Computes this rank's one of the batches of a turn, which are the step's from number `first` on. Returns the losses of
    /// all of them.
    fn turn(
        &self,
        step: u64,
        first: usize,
        turn: &[Batch],
        counted: f64,
        running: &mut Running,
    ) -> Result<Vec<StepLoss>> {
        let rank = self.ranks.rank();
        let mut numbers = Vec::new();
        if let Some(batch) = turn.get(rank) {
            let (tokens, targets, weights) = batch.tensors(self.model.device())?;
            let (objective, micro) = (running.objective.as_ref(), (first + rank) as u64);
            let context = StepContext { objective, teacher: self.teacher, config: self.config, step, micro };
            let gradients = &mut running.gradients.batch;
            let batch = StepBatch { tokens, targets, weights, counted };
            numbers = self.model.accumulate(&batch, &context, gradients)?.numbers();
        }
        let all = self.ranks.all_gather(&numbers);
        Ok(all[..turn.len()].iter().map(|numbers| StepLoss::of_numbers(numbers)).collect())
    }

    /// The number of a step's batch among all batches.
    fn batch_number(&self, step: u64, micro: usize) -> u64 {
        step * self.config.accumulation() as u64 + micro as u64
    }

    /// The optimizer's numbers for a step whose gradients have this norm.
    fn update(&self, step: u64, share: f64, grad_norm: f64) -> Update {
        let tuning = &self.config.tuning;
        let section = self.model.config().dynamoe.as_ref();
        let separate = section.is_some_and(|section| section.separate_shells > 0);
        let lr = self.config.lr * self.config.lr_share(step);
        let rate = |group| lr * self.config.rate(group, separate);
        Update {
            ffn_lr: rate(Group::DenseFfn),
            separate_lr: rate(Group::Separate),
            backbone_lr: rate(Group::Backbone),
            router_lr: rate(Group::Router),
            weight_decay: tuning.weight_decay,
            scale: share * (tuning.clip / grad_norm.max(1e-12)).min(1.0),
        }
    }

    /// What to say of a step whose `what` is not finite.
    fn diverged(&self, what: &str, value: f64, step: u64, saved: Option<u64>) -> Error {
        let batches =
            (0..self.config.accumulation()).map(|micro| self.batches.batch(self.batch_number(step, micro)));
        let from: Vec<String> =
            batches.flat_map(|batch| batch.origins).map(|origin| self.batches.describe(origin)).collect();
        let good = match (saved, self.state_dir) {
            (Some(step), Some(dir)) => format!("that of step {step} in {}", dir.display()),
            _ => "none was written yet".into(),
        };
        anyhow!(
            "the {what} of step {} is {value}; its batch: {}; last good checkpoint: {good}. Try a smaller --lr",
            step + 1,
            from.join(", ")
        )
    }
}

/// Steps in a second since the last time that it was asked.
struct Rate {
    since: Instant,
    steps: u64,
}

impl Rate {
    fn new(steps: u64) -> Self {
        Self { since: Instant::now(), steps }
    }

    fn steps_per_second(&mut self, done: u64) -> f64 {
        let rate = (done - self.steps) as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        *self = Self::new(done);
        rate
    }
}

#[cfg(test)]
mod tests;

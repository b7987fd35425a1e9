//! The training loop.

use std::path::Path;
use std::time::Instant;

use anyhow::{Error, Result, anyhow};
use dynamoe_model::ops::Gradients;

use super::config::TrainConfig;
use super::group::Group;
use super::metrics_log::MetricsLog;
use super::model::TrainModel;
use super::optimizer::{AdamW, Update};
use super::state::{self, Saved};
use super::step::{StepBatch, StepContext, StepLoss};
use super::stop::Stop;
use super::teacher::Teacher;
use crate::data::{Batch, Batches, Origin};
use crate::methods::Objective;
use crate::progress::{Progress, time};
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
    /// Of the model that training starts from.
    pub fingerprint: &'a str,
    /// Asked to stop, training ends after the step at hand.
    pub stop: &'a Stop,
    /// Shown in front of the progress.
    pub label: &'a str,
}

/// What changes while a training runs, besides the weights.
struct Running {
    optimizer: AdamW,
    gradients: Gradients,
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
        let _training = self.stop.training();
        let mut running = Running {
            optimizer: AdamW::new(self.model.params())?,
            gradients: Gradients::new(),
            objective: self.config.method.objective(&self.config.routing(self.model.config().width_shares())),
            saved: None,
        };
        if let Some(dir) = self.state_dir {
            running.saved = state::restore(dir, self.config, self.fingerprint, self.saved(&mut running))?;
        }
        let (start, steps) = (running.saved.unwrap_or(0), self.config.steps());
        let mut log = MetricsLog::open(self.state_dir, start)?;
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
            let stop = self.stop.is_asked();
            if done % self.config.save_every == 0 || done == steps || stop {
                self.save(&mut log, &mut running)?;
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
        let Some(dir) = self.state_dir else { return Ok(()) };
        log.sync()?;
        state::save(dir, self.config, self.fingerprint, &self.saved(running))?;
        running.saved = Some(running.optimizer.step);
        Ok(())
    }

    /// One optimizer step: the gradients of its batches, then the update.
    fn step(&self, step: u64, running: &mut Running) -> Result<StepReport> {
        let params = self.model.params();
        let count = self.config.accumulation() as u64;
        let share = 1.0 / count as f64;
        let batches: Vec<Batch> = (0..count).map(|micro| self.batches.batch(step * count + micro)).collect();
        // all tokens of a step that count have the same weight, whatever batch they are in
        let counted = share * batches.iter().map(Batch::counted).sum::<usize>().max(1) as f64;
        let mut report = StepReport::default();
        running.gradients.clear();
        let mut origins = Vec::new();
        for (micro, batch) in (0..).zip(batches) {
            let (tokens, targets, weights) = batch.tensors(self.model.device())?;
            let objective = running.objective.as_ref();
            let context = StepContext { objective, teacher: self.teacher, config: self.config, step, micro };
            let gradients = &mut running.gradients;
            let of_step = StepBatch { tokens, targets, weights, counted };
            let loss = self.model.accumulate(&of_step, &context, gradients)?;
            origins.extend(batch.origins);
            if !loss.objective.is_finite() {
                return Err(self.diverged("loss", loss.objective, step, running.saved, &origins));
            }
            report.add(&loss, share);
            running.objective.observe(&loss.dials, &loss.widths);
        }
        report.grad_norm = share * running.gradients.norm(params)?;
        if !report.grad_norm.is_finite() {
            return Err(self.diverged("gradient's norm", report.grad_norm, step, running.saved, &origins));
        }
        running.optimizer.update(params, &running.gradients, self.update(step, share, report.grad_norm))?;
        Ok(report)
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
    fn diverged(&self, what: &str, value: f64, step: u64, saved: Option<u64>, origins: &[Origin]) -> Error {
        let from: Vec<String> = origins.iter().map(|o| self.batches.describe(*o)).collect();
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

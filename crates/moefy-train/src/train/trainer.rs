//! The training loop.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Error, Result, anyhow};

use super::config::{Method, TrainConfig};
use super::objective::{Objective, objective};
use super::optimizer::{AdamW, Update};
use super::progress::Progress;
use super::state;
use super::step::TrainModel;
use crate::data::{Batches, Origin};
use crate::results::TrainMetrics;
use dynamoe_model::RoutedModel;
use dynamoe_model::checkpoint::write_atomic;
use dynamoe_model::ops::Gradients;

/// Trainings that this process runs now.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Whether a training runs in this process, so that there is something to save before it may end.
pub fn is_running() -> bool {
    RUNNING.load(Ordering::Relaxed) > 0
}

/// Counts a training as long as it lives.
struct Counted;

impl Counted {
    fn new() -> Self {
        RUNNING.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Asked to stop; the state after this many steps is saved.
    Stopped(u64),
}

/// A training run.
pub struct Trainer<'a> {
    /// Options.
    pub config: &'a TrainConfig,
    /// The weights.
    pub model: &'a TrainModel,
    /// Batches, a function of their number.
    pub batches: &'a Batches,
    /// The dense model, where its predictions are a target.
    pub teacher: Option<&'a RoutedModel>,
    /// Folder of checkpoints and metrics; none keeps neither.
    pub state_dir: Option<&'a Path>,
    /// Of the model that training starts from.
    pub fingerprint: &'a str,
    /// Set to stop after the step at hand.
    pub stop: &'a AtomicBool,
    /// Shown in front of the progress.
    pub label: &'a str,
}

/// What one optimizer step reports.
struct StepReport {
    loss: f64,
    objective: f64,
    mean_width: f64,
    grad_norm: f64,
}

impl Trainer<'_> {
    /// Runs to the end, from the newest checkpoint if there is one. Returns the metrics of the whole run.
    ///
    /// # Errors
    /// A loss that is not finite, with the step, the batch and the last good checkpoint; those of the file
    /// system.
    pub fn run(&self) -> Result<(Outcome, Vec<TrainMetrics>)> {
        self.config.validate()?;
        let _counted = Counted::new();
        let mut optimizer = AdamW::new(self.model.params())?;
        let mut saved = None;
        if let Some(dir) = self.state_dir {
            let params = self.model.params();
            saved = state::restore(dir, self.config, self.fingerprint, params, &mut optimizer)?;
        }
        let start = saved.unwrap_or(0);
        let mut log = MetricsLog::open(self.state_dir, start)?;
        let widths = self.model.config().expert_widths();
        let full = self.model.config().intermediate_size as f64;
        let shares: Vec<f64> = widths.iter().map(|&w| w as f64 / full).collect();
        let objective = objective(self.config, &shares);
        let steps = self.config.steps();
        let mut progress = Progress::new(self.label, steps, start);
        let (mut since, mut since_step) = (Instant::now(), start);
        let mut grads = Gradients::new();
        for step in start..steps {
            let report = self.step(step, objective.as_ref(), (&mut optimizer, &mut grads), saved)?;
            let done = step + 1;
            if done % self.config.log_every == 0 || done == steps {
                let tokens = (done - since_step) * self.config.tokens_per_step();
                let metrics = TrainMetrics {
                    step: done,
                    tokens: done * self.config.tokens_per_step(),
                    loss: report.loss,
                    objective: report.objective,
                    mean_width: report.mean_width,
                    grad_norm: report.grad_norm,
                    lr: self.config.lr * self.config.lr_share(step),
                    tokens_per_second: tokens as f64 / since.elapsed().as_secs_f64().max(1e-9),
                };
                progress.update(
                    done,
                    &format!(
                        "loss {:.3} width {:.2} {:.0} tok/s",
                        metrics.loss, metrics.mean_width, metrics.tokens_per_second
                    ),
                );
                log.push(metrics)?;
                (since, since_step) = (Instant::now(), done);
            }
            let stop = self.stop.load(Ordering::Relaxed);
            if done % self.config.save_every == 0 || done == steps || stop {
                saved = self.save(&mut log, &optimizer)?.or(saved);
            }
            if stop && done < steps {
                progress.finish();
                return Ok((Outcome::Stopped(done), log.metrics));
            }
        }
        progress.finish();
        Ok((Outcome::Finished, log.metrics))
    }

    fn save(&self, log: &mut MetricsLog, optimizer: &AdamW) -> Result<Option<u64>> {
        let Some(dir) = self.state_dir else { return Ok(None) };
        log.sync()?;
        state::save(dir, self.config, self.fingerprint, self.model.params(), optimizer)?;
        Ok(Some(optimizer.step))
    }

    fn step(
        &self,
        step: u64,
        objective: &dyn Objective,
        (optimizer, grads): (&mut AdamW, &mut Gradients),
        saved: Option<u64>,
    ) -> Result<StepReport> {
        let params = self.model.params();
        let share = 1.0 / self.config.accumulation as f64;
        let mut report = StepReport { loss: 0.0, objective: 0.0, mean_width: 0.0, grad_norm: 0.0 };
        grads.clear();
        let mut origins = Vec::new();
        for micro in 0..self.config.accumulation as u64 {
            let batch = self.batches.batch(step * self.config.accumulation as u64 + micro);
            let (tokens, targets) = batch.tensors(self.model.device())?;
            let inputs = (&tokens, &targets);
            let loss = self.model.loss(inputs, objective, self.teacher, self.config, (step, micro))?;
            let scalar = |t: &candle_core::Tensor| -> Result<f64> { Ok(f64::from(t.to_scalar::<f32>()?)) };
            let total = scalar(&loss.objective)?;
            origins.extend(batch.origins);
            if !total.is_finite() {
                return Err(self.diverged("loss", total, (step, saved), &origins));
            }
            report.objective += share * total;
            report.loss += share * scalar(&loss.language_model)?;
            report.mean_width +=
                share * loss.widths.iter().map(|&w| f64::from(w)).sum::<f64>() / loss.widths.len() as f64;
            grads.add(&loss.objective, params)?;
            self.model.adapt_prices(&loss)?;
        }
        report.grad_norm = share * grads.norm(params)?;
        if !report.grad_norm.is_finite() {
            return Err(self.diverged("gradient's norm", report.grad_norm, (step, saved), &origins));
        }
        let lr = self.config.lr * self.config.lr_share(step);
        let update = Update {
            ffn_lr: if self.has_own() { lr * self.config.shared_lr } else { lr },
            own_lr: lr * self.config.own_lr,
            backbone_lr: lr * self.config.backbone_lr,
            router_lr: lr * self.config.router_lr,
            weight_decay: self.config.weight_decay,
            scale: share * (self.config.clip / report.grad_norm.max(1e-12)).min(1.0),
        };
        optimizer.update(params, grads, update)?;
        Ok(report)
    }

    /// Whether the dense FFN's neurons are shared with narrow experts that have others of their own.
    fn has_own(&self) -> bool {
        let own_shells = self.model.config().dynamoe.as_ref().map_or(0, |section| section.own_shells);
        own_shells > 0 && self.config.method != Method::Dense
    }

    /// What to say of a step whose `what` is not finite.
    fn diverged(
        &self,
        what: &str,
        value: f64,
        (step, saved): (u64, Option<u64>),
        origins: &[Origin],
    ) -> Error {
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

/// metrics.jsonl: one [`TrainMetrics`] a line.
struct MetricsLog {
    file: Option<(File, PathBuf)>,
    metrics: Vec<TrainMetrics>,
}

impl MetricsLog {
    /// Opens the log, dropping lines after step `start`: a resumed run writes them again.
    fn open(dir: Option<&Path>, start: u64) -> Result<Self> {
        let Some(dir) = dir else { return Ok(Self { file: None, metrics: Vec::new() }) };
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let path = dir.join("metrics.jsonl");
        let (mut metrics, mut text): (Vec<TrainMetrics>, _) = (Vec::new(), String::new());
        if let Ok(file) = File::open(&path) {
            let lines = BufReader::new(file).lines().map_while(|line| line.ok());
            // a line cut short by a crash is one that the resumed run writes again
            metrics.extend(lines.map_while(|line| serde_json::from_str::<TrainMetrics>(&line).ok()));
            metrics.retain(|m| m.step <= start);
        }
        for line in &metrics {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        write_atomic(&path, text.as_bytes())?; // a kill here must not lose the lines that are kept
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(Self { file: Some((file, path)), metrics })
    }

    fn push(&mut self, metrics: TrainMetrics) -> Result<()> {
        if let Some((file, path)) = &mut self.file {
            writeln!(file, "{}", serde_json::to_string(&metrics)?)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        self.metrics.push(metrics);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        if let Some((file, path)) = &self.file {
            file.sync_all().with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

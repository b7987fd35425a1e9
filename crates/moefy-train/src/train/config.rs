//! The settings of a training.

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use dynamoe_model::ops::Precision;
use serde::{Deserialize, Serialize};

use super::group::Group;
use super::tuning::Tuning;
use crate::methods::{Method, Routing};

/// Which weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trained {
    /// Everything.
    All,
    /// What a DynaMoE model has beyond its dense origin: routers, compensation, the smaller experts' separate weights.
    /// The dense model's weights stay as they are, bit for bit.
    Added,
    /// Routers only. The similarity objective then needs no backward pass through the model; the priced one
    /// needs that of activations, not of weights.
    Routers,
}

/// How the optimizer keeps its moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MomentBits {
    /// In f32.
    #[default]
    #[serde(rename = "32")]
    Bits32,
    /// In 8 bits, with a scale for each block of 256.
    #[serde(rename = "8")]
    Bits8,
}

/// The settings of a training: all that decides its result besides the model and the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainConfig {
    /// How tokens are routed while training.
    pub method: Method,
    /// Which weights are trained.
    pub train: Trained,
    /// Training tokens; steps follow from this and the batch.
    pub tokens: u64,
    /// Sequences in an optimizer step.
    pub batch_size: usize,
    /// Sequences computed at a time, for memory; none for the whole batch.
    pub micro_batch: Option<usize>,
    /// Tokens in a sequence.
    pub sequence_length: usize,
    /// Whether layers are computed again in the backward pass, which saves the memory of their activations.
    pub recompute: bool,
    /// Precision of matrix products on a CPU.
    pub precision: Precision,
    /// How the optimizer keeps its moments.
    pub moment_bits: MomentBits,
    /// Peak learning rate.
    pub lr: f64,
    /// Strength of the distillation from the dense model, 0 to 1.
    pub distill: f64,
    /// Mean width that most sequences are trained near (priced).
    pub focus: f64,
    /// Seed of the data order, the dials and the noise.
    pub seed: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Constants.
    pub tuning: Tuning,
}

impl TrainConfig {
    /// Training tokens where none are given.
    pub const TOKENS: u64 = 1_000_000;
    /// Sequences in a step where none are given.
    pub const BATCH_SIZE: usize = 8;
    /// Tokens in a sequence where none are given.
    pub const SEQUENCE_LENGTH: usize = 256;
    /// Peak learning rate where none is given: found on a model of 260 thousand parameters. Larger models want smaller
    /// rates.
    pub const LR: f64 = 2e-3;
    /// Strength of the distillation where none is given.
    pub const DISTILL: f64 = 1.0;
    /// Mean width that most sequences are trained near where none is given: a little below the widths that are served
    /// most, since what a small expert learns serves larger ones too.
    pub const FOCUS: f64 = 0.45;
    /// Steps between checkpoints where none are given.
    pub const SAVE_EVERY: u64 = 200;
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            method: Method::Priced,
            train: Trained::All,
            tokens: Self::TOKENS,
            batch_size: Self::BATCH_SIZE,
            micro_batch: None,
            sequence_length: Self::SEQUENCE_LENGTH,
            recompute: false,
            precision: Precision::F32,
            moment_bits: MomentBits::Bits32,
            lr: Self::LR,
            distill: Self::DISTILL,
            focus: Self::FOCUS,
            seed: 0,
            save_every: Self::SAVE_EVERY,
            tuning: Tuning::default(),
        }
    }
}

impl TrainConfig {
    /// The same training by another method. Where the method cannot train only some of the weights, it trains all.
    pub fn by(&self, method: Method) -> Self {
        let other = Self { method, ..self.clone() };
        match other.validate() {
            Ok(()) => other,
            Err(_) => Self { train: Trained::All, ..other },
        }
    }

    /// Sequences computed at a time.
    pub fn micro_batch(&self) -> usize {
        self.micro_batch.unwrap_or(self.batch_size)
    }

    /// Batches whose gradients make one step.
    pub fn accumulation(&self) -> usize {
        self.batch_size / self.micro_batch().max(1)
    }

    /// Tokens that one optimizer step sees.
    pub fn tokens_per_step(&self) -> u64 {
        (self.batch_size * self.sequence_length) as u64
    }

    /// Optimizer steps of the run, at least 1.
    pub fn steps(&self) -> u64 {
        (self.tokens / self.tokens_per_step().max(1)).max(1)
    }

    /// The learning rate of step `step` (from 0) as a share of the peak: linear warmup, then a cosine.
    pub fn lr_share(&self, step: u64) -> f64 {
        let (steps, step) = (self.steps() as f64, step as f64);
        let warmup = (self.tuning.warmup * steps).max(1.0);
        if step < warmup {
            return (step + 1.0) / warmup;
        }
        let progress = (step - warmup) / (steps - warmup).max(1.0);
        let end = self.tuning.final_lr;
        end + (1.0 - end) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }

    /// A group's learning rate, as a multiple of the training's; 0 leaves the group as it is. `separate` says whether the
    /// smaller experts have separate weights, which spare the dense FFN's.
    pub fn rate(&self, group: Group, separate: bool) -> f64 {
        match group {
            Group::Router => self.tuning.router_lr,
            Group::Separate => self.tuning.separate_lr,
            Group::DenseFfn if separate && self.method != Method::Dense => self.tuning.shared_lr,
            Group::DenseFfn => 1.0,
            Group::Backbone => self.tuning.backbone_lr,
        }
    }

    /// Share of the dense model's predictions in the target.
    pub fn distill_predictions(&self) -> f64 {
        self.distill * self.tuning.distill_predictions
    }

    /// Weight of the difference from the dense model's hidden states.
    pub fn distill_hidden(&self) -> f64 {
        self.distill * self.tuning.distill_hidden
    }

    /// Whether training needs the dense model's predictions; plain fine-tuning never does.
    pub fn has_teacher(&self) -> bool {
        self.method != Method::Dense && (self.distill_predictions() > 0.0 || self.distill_hidden() > 0.0)
    }

    /// Whether training needs the dense model a second time, as its teacher. A model whose dense weights stay as they are is
    /// its own.
    pub fn needs_other_teacher(&self) -> bool {
        self.has_teacher() && self.train == Trained::All
    }

    /// What the method's objective needs to know, for experts of these shares of the width.
    pub fn routing(&self, width_shares: Vec<f64>) -> Routing {
        Routing {
            width_shares,
            sequences: self.steps() * self.batch_size as u64,
            focus: self.focus,
            focus_power: self.tuning.focus_power,
            // a sequence at full width teaches nothing where dense weights stay as they are
            full_share: if self.train == Trained::All { self.tuning.full_share } else { 0.0 },
            narrowest_share: self.tuning.narrowest_share,
            temperature: self.tuning.temperature,
            noise: self.tuning.noise,
        }
    }

    /// Refuses ranks that would have nothing to do, or that cannot add up their gradients.
    ///
    /// # Errors
    /// More ranks than a step has batches; several ranks and another device than the CPU.
    pub fn check_ranks(&self, ranks: usize, device: &Device) -> Result<()> {
        ensure!(
            ranks <= self.batch_size,
            "{ranks} processes cannot divide a step of --batch-size {}: start at most as many as there are sequences",
            self.batch_size
        );
        let enough = (1..=self.batch_size / ranks).rev().find(|&micro| self.batch_size.is_multiple_of(micro));
        ensure!(
            ranks <= self.accumulation(),
            "{ranks} processes have to divide a step of --batch-size {} into parts of --micro-batch {}: that makes {}; give \
             --micro-batch {}, or start fewer processes",
            self.batch_size,
            self.micro_batch(),
            self.accumulation(),
            enough.unwrap_or(1)
        );
        ensure!(
            ranks == 1 || device.is_cpu(),
            "--device cuda: {ranks} processes can train on processors only for now; start one process"
        );
        Ok(())
    }

    /// Makes the precision the process's.
    ///
    /// # Errors
    /// bf16 on a processor that cannot, or on another device.
    pub fn set_precision(&self, device: &Device) -> Result<()> {
        ensure!(
            self.precision == Precision::F32 || device.is_cpu(),
            "--precision bf16 is for --device cpu: leave it out with --device cuda"
        );
        self.precision.set().context("--precision")
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.lr.is_finite() && self.lr > 0.0, "--lr must be a number above 0, found {}", self.lr);
        for (name, value) in [("--distill", self.distill), ("--focus", self.focus)] {
            ensure!((0.0..=1.0).contains(&value), "{name} must be from 0 to 1, found {value}");
        }
        let counts = [
            ("--batch-size", self.batch_size as u64),
            ("--micro-batch", self.micro_batch() as u64),
            ("--sequence-length", self.sequence_length as u64),
            ("--tokens", self.tokens),
            ("--save-every", self.save_every),
        ];
        for (name, value) in counts {
            ensure!(value > 0, "{name} must be 1 or more, found 0");
        }
        ensure!(
            self.batch_size.is_multiple_of(self.micro_batch()),
            "--micro-batch must divide --batch-size {}, found {}",
            self.batch_size,
            self.micro_batch()
        );
        ensure!(
            self.batch_size.checked_mul(self.sequence_length).is_some(),
            "--batch-size × --sequence-length is too large"
        );
        self.tuning.validate().context("--set")?;
        ensure!(
            self.train != Trained::Routers || self.method.has_router(),
            "--train routers needs a --method with a router: priced or similarity, found {}",
            self.method
        );
        ensure!(
            self.train != Trained::Added || self.method != Method::Dense,
            "--train added leaves nothing to train with --method dense: all weights of a dense model are its own"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_then_falls() {
        let config = TrainConfig { tokens: 400 * 2048, ..TrainConfig::default() };
        let shares: Vec<f64> = (0..config.steps()).map(|step| config.lr_share(step)).collect();
        let top = shares.iter().position(|&s| s == 1.0).unwrap();
        assert_eq!((shares.len(), top), (400, 19));
        assert!(shares[..=top].is_sorted() && shares[top..].is_sorted_by(|a, b| a >= b));
        assert!((shares[399] - config.tuning.final_lr).abs() < 1e-3);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = TrainConfig::default();
        good.validate().unwrap();
        for (wrong, named) in [
            (TrainConfig { lr: f64::NAN, ..good.clone() }, "--lr"),
            (TrainConfig { batch_size: 0, ..good.clone() }, "--batch-size"),
            (
                TrainConfig { tuning: Tuning { full_share: 0.6, ..Tuning::default() }, ..good.clone() },
                "--set",
            ),
            (TrainConfig { batch_size: 6, micro_batch: Some(4), ..good.clone() }, "--micro-batch"),
            (TrainConfig { focus: 1.5, ..good.clone() }, "--focus"),
            (TrainConfig { batch_size: usize::MAX, ..good.clone() }, "--batch-size × --sequence-length"),
            (
                TrainConfig { train: Trained::Routers, method: Method::Static, ..good.clone() },
                "--train routers",
            ),
        ] {
            let error = format!("{:#}", wrong.validate().unwrap_err());
            assert!(error.contains(named), "{named:?} not in: {error}");
        }
    }

    #[test]
    fn full_width_is_trained_where_it_can_learn() {
        let full_share =
            |train| TrainConfig { train, ..TrainConfig::default() }.routing(vec![0.5, 1.0]).full_share;
        assert_eq!(full_share(Trained::All), Tuning::default().full_share);
        assert_eq!([Trained::Added, Trained::Routers].map(full_share), [0.0; 2]);
    }

    #[test]
    fn every_rank_needs_a_part_of_a_step() {
        let train = TrainConfig { batch_size: 9, ..TrainConfig::default() };
        let error =
            |train: &TrainConfig, ranks| train.check_ranks(ranks, &Device::Cpu).unwrap_err().to_string();
        assert!(error(&train, 2).ends_with("that makes 1; give --micro-batch 3, or start fewer processes"));
        assert!(error(&train, 10).contains("at most as many"));
        let parts = TrainConfig { micro_batch: Some(3), ..train };
        parts.check_ranks(3, &Device::Cpu).unwrap();
        assert!(error(&parts, 4).contains("give --micro-batch 1"));
    }

    #[test]
    fn a_baseline_trains_what_its_method_can() {
        for (train, method, expected) in [
            (Trained::Added, Method::Static, Trained::Added),
            (Trained::Added, Method::Dense, Trained::All),
            (Trained::Routers, Method::Similarity, Trained::Routers),
            (Trained::Routers, Method::Static, Trained::All),
        ] {
            let config = TrainConfig { train, ..TrainConfig::default() }.by(method);
            assert_eq!((config.method, config.train), (method, expected));
            config.validate().unwrap();
        }
    }
}

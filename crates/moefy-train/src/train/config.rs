//! What a training run is told.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// How tokens are routed while training, and so what the model is trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every token at full width: plain fine-tuning of the dense model. The baseline for quality.
    Dense,
    /// One width for all tokens and layers of a sequence, drawn at random (MatFormer). The baseline for any
    /// router.
    Static,
    /// Every token of every layer draws its width: what routing is worth that looks at nothing.
    Random,
    /// The paper's: the router predicts how similar each expert's output is to the whole FFN's; tokens take
    /// the smallest expert whose predicted similarity reaches a random threshold.
    Similarity,
    /// The router is trained through the language-model loss, with a price on width.
    Priced,
}

impl Method {
    /// Whether the method trains a router.
    pub fn has_router(self) -> bool {
        matches!(self, Self::Similarity | Self::Priced)
    }

    /// The name used in tables and legends.
    pub fn label(self) -> &'static str {
        match self {
            Self::Dense => "dense fine-tuned",
            Self::Static => "static nested",
            Self::Random => "random routing",
            Self::Similarity => "similarity router",
            Self::Priced => "DynaMoE",
        }
    }
}

/// Which weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Routers only. The similarity objective then needs no backward pass through the model; the priced one
    /// needs that of activations, not of weights.
    Router,
    /// Everything.
    Full,
}

/// Options of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Args)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainConfig {
    /// How tokens are routed while training
    #[arg(long, value_enum, default_value = "priced")]
    pub method: Method,
    /// Which weights are trained
    #[arg(long, value_enum, default_value = "full")]
    pub mode: Mode,
    /// Training tokens; steps follow from this and the batch
    #[arg(long, default_value_t = 1_000_000)]
    pub tokens: u64,
    /// Sequences in a batch
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    pub sequence_length: usize,
    /// Batches whose gradients make one step
    #[arg(long, default_value_t = 1)]
    pub accumulation: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f64,
    /// Learning rate of the routers, as a multiple of --lr
    #[arg(long, default_value_t = 10.0)]
    pub router_lr: f64,
    /// Learning rate of what narrow experts have of their own, as a multiple of --lr
    #[arg(long, default_value_t = 2.0)]
    pub own_lr: f64,
    /// Learning rate of the dense FFN's neurons where narrow experts have their own, as a multiple of --lr
    #[arg(long, default_value_t = 0.3)]
    pub shared_lr: f64,
    /// Learning rate of all but FFNs and routers, as a multiple of --lr
    #[arg(long, default_value_t = 0.15)]
    pub backbone_lr: f64,
    /// Share of the steps over which the learning rate rises from 0
    #[arg(long, default_value_t = 0.05)]
    pub warmup: f64,
    /// Where the cosine ends, as a share of the peak
    #[arg(long, default_value_t = 0.05)]
    pub final_lr: f64,
    /// Decay of matrices per step and unit of learning rate
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; larger ones are scaled down
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Weight of the distillation from the dense model, 0 to 1; the rest is the language-model loss
    #[arg(long, default_value_t = 0.8)]
    pub distill: f64,
    /// Weight of the difference to the dense model's hidden states, relative to their size
    #[arg(long, default_value_t = 3.0)]
    pub distill_hidden: f64,
    /// Softness of the router's decisions to its gradient, in logits (priced)
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f64,
    /// Spread of the noise on router logits (priced)
    #[arg(long, default_value_t = 0.1)]
    pub noise: f64,
    /// Mean width that most sequences are trained near (priced)
    #[arg(long, default_value_t = 0.45)]
    pub focus: f64,
    /// How near: 1 trains all mean widths alike, 2 and more crowd around --focus (priced)
    #[arg(long, default_value_t = 2.0)]
    pub focus_power: f64,
    /// Share of sequences trained at full width
    #[arg(long, default_value_t = 0.12)]
    pub full_share: f64,
    /// Share of sequences trained at the narrowest width
    #[arg(long, default_value_t = 0.06)]
    pub narrowest_share: f64,
    /// Seed of the data order, the dials and the noise
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 200)]
    pub save_every: u64,
    /// Steps between lines of metrics
    #[arg(long, default_value_t = 10)]
    pub log_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            config: TrainConfig,
        }
        <Defaults as clap::Parser>::parse_from(["defaults"]).config
    }
}

impl TrainConfig {
    /// Tokens that one optimizer step sees.
    pub fn tokens_per_step(&self) -> u64 {
        (self.batch_size * self.sequence_length * self.accumulation) as u64
    }

    /// Optimizer steps of the run, at least 1.
    pub fn steps(&self) -> u64 {
        (self.tokens / self.tokens_per_step().max(1)).max(1)
    }

    /// The learning rate of step `step` (from 0) as a share of the peak: linear warmup, then a cosine.
    pub fn lr_share(&self, step: u64) -> f64 {
        let (steps, step) = (self.steps() as f64, step as f64);
        let warmup = (self.warmup * steps).max(1.0);
        if step < warmup {
            return (step + 1.0) / warmup;
        }
        let progress = (step - warmup) / (steps - warmup).max(1.0);
        self.final_lr + (1.0 - self.final_lr) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }

    /// Whether training needs the dense model's predictions; plain fine-tuning never does.
    pub fn has_teacher(&self) -> bool {
        self.method != Method::Dense && (self.distill > 0.0 || self.distill_hidden > 0.0)
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("--lr", self.lr),
            ("--router-lr", self.router_lr),
            ("--backbone-lr", self.backbone_lr),
            ("--own-lr", self.own_lr),
            ("--shared-lr", self.shared_lr),
            ("--clip", self.clip),
            ("--temperature", self.temperature),
            ("--focus-power", self.focus_power),
        ];
        for (name, value) in positive {
            ensure!(value.is_finite() && value > 0.0, "{name} must be a number above 0, found {value}");
        }
        let shares = [
            ("--warmup", self.warmup, 1.0),
            ("--final-lr", self.final_lr, 1.0),
            ("--distill", self.distill, 1.0),
            ("--focus", self.focus, 1.0),
            ("--full-share", self.full_share, 0.5),
            ("--narrowest-share", self.narrowest_share, 0.5),
            ("--noise", self.noise, 100.0),
            ("--distill-hidden", self.distill_hidden, 1000.0),
            ("--weight-decay", self.weight_decay, 1.0),
        ];
        for (name, value, top) in shares {
            ensure!((0.0..=top).contains(&value), "{name} must be from 0 to {top}, found {value}");
        }
        let counts = [
            ("--batch-size", self.batch_size as u64),
            ("--sequence-length", self.sequence_length as u64),
            ("--accumulation", self.accumulation as u64),
            ("--tokens", self.tokens),
            ("--save-every", self.save_every),
            ("--log-every", self.log_every),
        ];
        for (name, value) in counts {
            ensure!(value > 0, "{name} must be 1 or more, found 0");
        }
        let step = self.batch_size.checked_mul(self.sequence_length);
        ensure!(
            step.and_then(|tokens| tokens.checked_mul(self.accumulation)).is_some(),
            "--batch-size × --sequence-length × --accumulation is too large"
        );
        ensure!(
            self.mode == Mode::Full || self.method.has_router(),
            "--mode router needs a --method with a router: priced or similarity, found {:?}",
            self.method
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
        assert!((shares[399] - config.final_lr).abs() < 1e-3);
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            TrainConfig { lr: f64::NAN, ..TrainConfig::default() },
            TrainConfig { batch_size: 0, ..TrainConfig::default() },
            TrainConfig { full_share: 0.6, ..TrainConfig::default() },
            TrainConfig { focus: 1.5, ..TrainConfig::default() },
            TrainConfig { batch_size: usize::MAX, ..TrainConfig::default() },
            TrainConfig { mode: Mode::Router, method: Method::Static, ..TrainConfig::default() },
        ] {
            assert!(wrong.validate().is_err(), "{wrong:?}");
        }
        TrainConfig::default().validate().unwrap();
    }
}

//! Arguments that several commands share, and what they stand for in the library.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Device;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use dynamoe_model::config::engine;
use dynamoe_model::ops::Precision;
use dynamoe_model::{Checkpoint, ModelConfig, hub};

use moefy_train::data::{DOCUMENT_MARKER, DataSource, TextFormat, TextOptions};
use moefy_train::methods::Method;
use moefy_train::pipeline::{Existing, HeldOut, Inputs};
use moefy_train::prepare::{ExpertConfig, Experts};
use moefy_train::train::{MomentBits, TrainConfig, Trained, Tuning};

/// Headings of `--help`, in the order of a command's arguments.
pub mod heading {
    pub const INPUT: &str = "Model and text";
    pub const EXPERTS: &str = "Experts";
    pub const TRAINING: &str = "Training";
    pub const REPORT: &str = "Report";
    pub const OUTPUT: &str = "Output";
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The processor
    Cpu,
    /// The first NVIDIA GPU; needs a build with `--features cuda`
    Cuda,
}

impl DeviceArg {
    /// Opens the device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0).context(
                "--device cuda: no GPU can be used; this needs an NVIDIA GPU and a build with `--features cuda`",
            ),
        }
    }
}

/// Precision of matrix products on the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// 32 bits
    F32,
    /// Factors rounded to bf16, sums in 32 bits: faster, on processors with avx512_bf16
    Bf16,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

/// Bits of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BitsArg {
    /// 32 bits
    #[value(name = "32")]
    Bits32,
    /// 8 bits, with a scale for each block of 256
    #[value(name = "8")]
    Bits8,
}

/// How text files are read.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::INPUT)]
pub struct TextArgs {
    /// What stands between two documents of a .txt file
    #[arg(long, value_name = "TEXT", default_value = DOCUMENT_MARKER)]
    marker: String,
    /// The field of a .jsonl file's lines, or the column of a .parquet file, that holds the text [default: text, else
    /// prompt and completion, else messages]
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
    /// Take the loss on answers only: on the completion of a prompt, or on the assistant's messages
    #[arg(long)]
    mask_prompt: bool,
    /// Folder of tokenized text [default: $XDG_CACHE_HOME/dynamoe or ~/.cache/dynamoe]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

impl TextArgs {
    /// As the library takes it.
    pub fn options(&self) -> TextOptions {
        let format = TextFormat {
            marker: self.marker.clone(),
            field: self.field.clone(),
            chat: None,
            mask_prompt: self.mask_prompt,
        };
        TextOptions { format, cache_dir: self.cache_dir.clone() }
    }
}

/// Sources whose files are here, those on the hub fetched now.
pub fn fetched(sources: &[DataSource]) -> Result<Vec<DataSource>> {
    let mut sources = sources.to_vec();
    sources.iter_mut().try_for_each(|source| source.fetch(&[]))?;
    Ok(sources)
}

/// The dense model and the texts of commands that train and measure.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::INPUT)]
pub struct InputArgs {
    #[command(flatten)]
    model: DenseArgs,
    /// Text to train on: PATH[:WEIGHT], a file (.txt, .jsonl, also .gz or .zst, or .parquet), a folder, a pattern of files,
    /// or hf://datasets/ORG/NAME[@REVISION][/PATTERN]; or self[:TOKENS], which the model writes itself before it is
    /// trained, by default a quarter of --tokens; may be repeated
    #[arg(long, required = true, value_name = "PATH[:WEIGHT]|self[:TOKENS]")]
    data: Vec<DataSource>,
    /// Text to evaluate on [default: a held-out part of --data]
    #[arg(long, value_name = "PATH", value_parser = DataSource::of_files)]
    valid: Vec<DataSource>,
    #[command(flatten)]
    text: TextArgs,
}

impl InputArgs {
    /// As the library takes it.
    pub fn inputs(&self) -> Inputs {
        Inputs {
            model: self.model.model.clone(),
            tokenizer: self.model.tokenizer.path().map(Path::to_owned),
            data: self.data.clone(),
            held_out: HeldOut::files_or_tail(&self.valid),
            text: self.text.options(),
        }
    }
}

/// How a dense model is cut into experts.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::EXPERTS)]
pub struct ExpertArgs {
    /// Number of experts, of even widths that fit quantization's blocks; or their widths in neurons, ascending,
    /// separated by commas
    #[arg(long, value_name = "COUNT|WIDTHS", default_value_t = ExpertConfig::default().experts)]
    experts: Experts,
    /// For how many of the first shells (the neurons from one expert's width to the next) the smaller experts get
    /// separate weights: more memory, same speed [default: half of the shells]
    #[arg(long, value_name = "COUNT")]
    separate_shells: Option<usize>,
}

impl ExpertArgs {
    /// As the library takes it.
    pub fn config(&self) -> ExpertConfig {
        ExpertConfig { experts: self.experts.clone(), separate_shells: self.separate_shells }
    }
}

/// Parses a method by its name; `--help` shows the sentence on each.
pub fn method_parser() -> impl TypedValueParser<Value = Method> {
    let value = |method: Method| PossibleValue::new(method.name()).help(method.description());
    PossibleValuesParser::new(Method::ALL.map(value)).try_map(|name| name.parse::<Method>())
}

/// Methods separated by commas, or `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Methods(pub Vec<Method>);

impl std::str::FromStr for Methods {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        Ok(Self(text.split(',').map(|name| name.trim().parse()).collect::<Result<_>>()?))
    }
}

/// Which weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrainArg {
    /// Everything
    All,
    /// What DynaMoE adds: routers, compensation, separate weights. The dense model's weights stay as they are
    Added,
    /// Routers only
    Routers,
}

/// How long and how fast a command trains, whatever the method.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::TRAINING)]
pub struct StepArgs {
    /// Training tokens; steps follow from this and the batch
    #[arg(long, default_value_t = TrainConfig::TOKENS)]
    pub tokens: u64,
    /// Sequences in a step
    #[arg(long, default_value_t = TrainConfig::BATCH_SIZE)]
    batch_size: usize,
    /// Sequences computed at a time: fewer need less memory [default: --batch-size]
    #[arg(long)]
    micro_batch: Option<usize>,
    /// Tokens in a sequence
    #[arg(long, default_value_t = TrainConfig::SEQUENCE_LENGTH)]
    sequence_length: usize,
    /// Compute layers again in the backward pass instead of keeping their activations: less memory, more time
    #[arg(long)]
    recompute: bool,
    /// Precision of matrix products, also where the command measures
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionArg,
    /// Bits of each of the optimizer's two moments: 8 take a quarter of the memory
    #[arg(long, value_enum, default_value = "32")]
    moment_bits: BitsArg,
    /// Peak learning rate
    #[arg(long, default_value_t = TrainConfig::LR)]
    lr: f64,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Change a constant of training, for research; docs/method.md lists them. May be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps between checkpoints of the training
    #[arg(long, default_value_t = TrainConfig::SAVE_EVERY, help_heading = heading::OUTPUT)]
    save_every: u64,
    /// Folder for event files, in which TensorBoard shows how trainings go
    #[arg(long, value_name = "DIR", help_heading = heading::OUTPUT)]
    pub tensorboard: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu", help_heading = heading::OUTPUT)]
    pub device: DeviceArg,
}

impl StepArgs {
    /// The settings with every other one at its default, and these constants to begin with.
    pub fn config(&self, mut tuning: Tuning) -> Result<TrainConfig> {
        for assignment in &self.set {
            tuning.set(assignment).with_context(|| format!("--set {assignment}"))?;
        }
        Ok(TrainConfig {
            tokens: self.tokens,
            batch_size: self.batch_size,
            micro_batch: self.micro_batch,
            sequence_length: self.sequence_length,
            recompute: self.recompute,
            precision: self.precision.into(),
            moment_bits: match self.moment_bits {
                BitsArg::Bits32 => MomentBits::Bits32,
                BitsArg::Bits8 => MomentBits::Bits8,
            },
            lr: self.lr,
            seed: self.seed,
            save_every: self.save_every,
            tuning,
            ..TrainConfig::default()
        })
    }
}

/// How and where a command trains.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::TRAINING)]
pub struct TrainingArgs {
    /// How tokens get their widths in training
    #[arg(long, value_parser = method_parser(), default_value_t = TrainConfig::default().method)]
    pub method: Method,
    /// Which weights are trained
    #[arg(long, value_enum, default_value = "all")]
    train: TrainArg,
    /// Strength of the distillation from the dense model, from 0 (none) to 1
    #[arg(long, default_value_t = TrainConfig::DISTILL)]
    distill: f64,
    /// Mean width that most sequences are trained near
    #[arg(long, value_name = "WIDTH", default_value_t = TrainConfig::FOCUS)]
    focus: f64,
    #[command(flatten)]
    pub steps: StepArgs,
}

impl TrainingArgs {
    /// As the library takes it.
    pub fn config(&self) -> Result<TrainConfig> {
        Ok(TrainConfig {
            method: self.method,
            train: match self.train {
                TrainArg::All => Trained::All,
                TrainArg::Added => Trained::Added,
                TrainArg::Routers => Trained::Routers,
            },
            distill: self.distill,
            focus: self.focus,
            ..self.steps.config(Tuning::default())?
        })
    }
}

/// What becomes of an output folder that is not empty; by default it is refused.
#[derive(Debug, Args)]
#[command(next_help_heading = heading::OUTPUT)]
pub struct ExistingArgs {
    /// Replace an existing output folder
    #[arg(long, conflicts_with = "resume")]
    force: bool,
    /// Continue an interrupted run in the output folder
    #[arg(long)]
    resume: bool,
}

impl ExistingArgs {
    /// As the library takes it.
    pub fn existing(&self) -> Existing {
        Existing { force: self.force, resume: self.resume }
    }
}

/// A dense model to read.
#[derive(Debug, Args)]
pub struct DenseArgs {
    /// Dense model: a folder, a hub id or a .gguf file
    #[arg(long)]
    model: String,
    #[command(flatten)]
    tokenizer: TokenizerArg,
}

impl DenseArgs {
    /// Opens it.
    pub fn open(&self) -> Result<Checkpoint> {
        self.tokenizer.open(&self.model)
    }

    /// Where it is, if it is not on the hub.
    pub fn path(&self) -> &Path {
        Path::new(&self.model)
    }
}

/// The tokenizer of a GGUF file.
#[derive(Debug, Args)]
pub struct TokenizerArg {
    /// For a .gguf file: the model's tokenizer.json [default: made of what the file says]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

impl TokenizerArg {
    /// Opens a model by folder, hub id or GGUF file.
    pub fn open(&self, model: &str) -> Result<Checkpoint> {
        Checkpoint::open(&hub::resolve_with(model, self.path())?)
    }

    /// The file that was given.
    pub fn path(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }
}

/// A model to read, whole or as a base with an add-on.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A model: a folder, a hub id or a .gguf file
    #[arg(long)]
    pub model: String,
    #[command(flatten)]
    tokenizer: TokenizerArg,
    /// Add-on that makes a DynaMoE model of the dense --model: its folder
    #[arg(long, value_name = "DIR")]
    add_on: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens it.
    pub fn open(&self) -> Result<Checkpoint> {
        with_add_on(self.tokenizer.open(&self.model)?, self.add_on.as_deref())
    }
}

/// Puts a base and its add-on together.
pub fn with_add_on(base: Checkpoint, add_on: Option<&Path>) -> Result<Checkpoint> {
    match add_on {
        Some(dir) => base.with_add_on(dir),
        None => Ok(base),
    }
}

/// Warns of what keeps mistral.rs from serving a model of this configuration, before time is spent on training it.
pub fn warn_unless_served(config: &ModelConfig) {
    for refusal in engine::refusals(config) {
        tracing::warn!("dynamoe-serve will refuse the result: config.json: {refusal}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_a_list_or_none() {
        assert_eq!("none".parse::<Methods>().unwrap().0, []);
        assert_eq!("dense, static".parse::<Methods>().unwrap().0, [Method::Dense, Method::Static]);
        assert!("dense,wide".parse::<Methods>().unwrap_err().to_string().contains("\"wide\""));
    }

    /// What the command line leaves out is what the library leaves out.
    #[test]
    fn defaults_are_the_librarys() {
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            training: TrainingArgs,
            #[command(flatten)]
            experts: ExpertArgs,
        }
        let defaults = <Defaults as clap::Parser>::parse_from(["defaults"]);
        assert_eq!(defaults.training.config().unwrap(), TrainConfig::default());
        assert_eq!(defaults.experts.config(), ExpertConfig::default());
    }
}

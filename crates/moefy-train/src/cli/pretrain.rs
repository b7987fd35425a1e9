//! `pretrain`: a small dense model from scratch.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::options::{ExistingArgs, StepArgs, TextArgs, heading};
use super::{print, stopped};
use moefy_train::data::DataSource;
use moefy_train::methods::Method;
use moefy_train::pipeline::pretrain::{Pretrain, Shape};
use moefy_train::pipeline::{RunFolder, describe_sources};
use moefy_train::ranks::Ranks;
use moefy_train::train::{Outcome, Stop, TrainConfig, Tuning};

#[derive(Debug, Args)]
pub struct PretrainArgs {
    /// Folder of the model
    #[arg(long, help_heading = heading::OUTPUT)]
    out: PathBuf,
    /// Text to train on [default: text that this program generates, as for the demo's base]
    #[arg(long, help_heading = heading::INPUT, value_parser = DataSource::of_files)]
    data: Vec<DataSource>,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    steps: StepArgs,
    #[command(flatten)]
    existing: ExistingArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Shape")]
struct ShapeArgs {
    /// Width of the hidden states
    #[arg(long, default_value_t = 64)]
    hidden_size: usize,
    /// Neurons of each FFN
    #[arg(long, default_value_t = 192)]
    intermediate_size: usize,
    /// Decoder layers
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Key and value heads
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    /// Tokens of the byte-level BPE that is trained on the text
    #[arg(long, default_value_t = 768)]
    vocab_size: usize,
    /// Longest sequence
    #[arg(long, default_value_t = 512)]
    positions: usize,
    /// Store the weights as bf16
    #[arg(long)]
    bf16: bool,
}

impl ShapeArgs {
    fn shape(&self) -> Shape {
        Shape {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            vocab_size: self.vocab_size,
            positions: self.positions,
            bf16: self.bf16,
        }
    }
}

pub fn pretrain(args: &PretrainArgs, stop: &Stop, ranks: &dyn Ranks) -> Result<()> {
    // random weights have nothing to keep: all of them learn at the same rate
    let tuning = Tuning { backbone_lr: 1.0, ..Tuning::default() };
    let train = TrainConfig { method: Method::Dense, ..args.steps.config(tuning)? };
    train.validate()?;
    let device = args.steps.device.open()?;
    let read: Vec<&Path> = args.data.iter().map(|source| source.path.as_path()).collect();
    let (shape, text, existing) = (args.shape.shape(), args.text.options(), args.existing.existing());
    RunFolder::check(&args.out, existing, &read)?;
    let tensorboard = args.steps.tensorboard.clone();
    let mut pretrain = Pretrain { shape, train, data: args.data.clone(), text, tensorboard };
    pretrain.check(&device, ranks)?;
    let earlier = RunFolder::earlier(&args.out, existing)?;
    let fetch = || pretrain.data.iter_mut().try_for_each(|source| source.fetch(earlier.as_slice()));
    ranks.first_then_others(fetch)?;
    let settings = json!({
        "data": describe_sources(&pretrain.data)?,
        "shape": pretrain.shape,
        "tokens": pretrain.train.tokens,
        "seed": pretrain.train.seed,
        "mask-prompt": pretrain.text.format.mask_prompt,
    });
    let folder = RunFolder::prepare(&args.out, existing, &read, &settings, ranks)?;
    match pretrain.run(&folder, &device, stop)? {
        Outcome::Stopped(step) => stopped(step),
        Outcome::Finished => print(&format_args!("{}", folder.out().display())),
    }
}

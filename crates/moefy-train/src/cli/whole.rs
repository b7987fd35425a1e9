//! `run`, `demo` and `pretrain`: several steps in one go.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::args::{ExpertArgs, InputArgs, TrainingArgs};
use super::print;
use crate::data::DataSource;
use crate::demo;
use crate::pretrain::{Pretrain, pretrain as train_dense};
use crate::run::{Existing, Inputs, Job, RunFolder, run_job};
use crate::train::{Method, Outcome, TrainConfig};
use dynamoe_model::checkpoint::refuse_overlap;

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    inputs: InputArgs,
    /// Folder of the finished checkpoint and its report
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    training: TrainingArgs,
    /// Baselines trained alike for the report's curves
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["dense", "static", "random"])]
    baselines: Vec<Method>,
    /// Train no baselines
    #[arg(long)]
    no_baselines: bool,
    /// Leave the oracle's curve out
    #[arg(long)]
    no_oracle: bool,
    /// Tokens on which curves are measured at most
    #[arg(long, default_value_t = 200_000)]
    eval_tokens: usize,
    /// Minimal pairs for the report: .jsonl with "good" and "bad"
    #[arg(long)]
    pairs: Option<PathBuf>,
    #[command(flatten)]
    existing: Existing,
    /// TOML file whose keys are these flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl RunArgs {
    fn job(&self) -> Job {
        Job {
            model: self.inputs.model.clone(),
            data: self.inputs.data.clone(),
            valid: self.inputs.valid.clone(),
            experts: self.experts.clone(),
            train: self.training.train.clone(),
            baselines: if self.no_baselines { Vec::new() } else { self.baselines.clone() },
            oracle: !self.no_oracle,
            eval_tokens: self.eval_tokens,
            pairs: self.pairs.clone(),
            text: self.training.text.clone(),
        }
    }
}

pub fn run(args: &RunArgs, stop: &AtomicBool) -> Result<()> {
    let device = args.training.device.open()?;
    let job = args.job();
    let texts = args.inputs.data.iter().chain(&args.inputs.valid).map(|source| source.path.as_path());
    let mut read: Vec<&Path> = texts.chain(args.pairs.as_deref()).collect();
    RunFolder::check(&args.out, args.existing, &read)?;
    let inputs = Inputs::open(&job)?;
    let model = inputs.model_dir().to_owned();
    refuse_overlap(&model, &args.out)?;
    read.push(&model);
    let told = inputs.describe(&job)?;
    let folder = RunFolder::prepare(&args.out, args.existing, &read, &told)?;
    let outcome = run_job(&job, inputs, &folder, &device, stop)?;
    say(&folder, outcome)
}

fn say(folder: &RunFolder, outcome: Outcome) -> Result<()> {
    let out = folder.out().display();
    match outcome {
        Outcome::Stopped(step) => {
            print(&format_args!("stopped after step {step}; the same command with --resume continues"))?;
        }
        Outcome::Finished => {
            print(&format_args!("report      {}", folder.out().join("report.html").display()))?;
            print(&format_args!("checkpoint  {out}"))?;
            print(&format_args!(
                "evaluate    moefy-train evaluate --model {out} --data TEXT --budget 0.5,0.75"
            ))?;
            print(&format_args!("serve       dynamoe-serve --model {out} --sensitivity 0.5"))?;
        }
    }
    Ok(())
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Folder of the finished checkpoint and its report
    #[arg(long, default_value = "dynamoe-demo")]
    out: PathBuf,
    /// Training tokens
    #[arg(long, default_value_t = demo::TOKENS)]
    tokens: u64,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    existing: Existing,
}

pub fn demo(args: &DemoArgs, stop: &AtomicBool) -> Result<()> {
    let told = json!({ "demo": env!("CARGO_PKG_VERSION"), "tokens": args.tokens, "seed": args.seed });
    let folder = RunFolder::prepare(&args.out, args.existing, &[], &told)?;
    let base = demo::write_base(&folder)?;
    let job = demo::job(&base, args.tokens, args.seed);
    let outcome = run_job(&job, Inputs::open(&job)?, &folder, &candle_core::Device::Cpu, stop)?;
    say(&folder, outcome)
}

#[derive(Debug, Args)]
pub struct PretrainArgs {
    /// Folder of the model
    #[arg(long)]
    out: PathBuf,
    /// Text to train on [default: text that this program generates, as for the demo's base]
    #[arg(long)]
    data: Vec<DataSource>,
    #[command(flatten)]
    shape: Pretrain,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    existing: Existing,
}

pub fn pretrain(args: &PretrainArgs, stop: &AtomicBool) -> Result<()> {
    let train = TrainConfig { method: Method::Dense, ..args.training.train.clone() };
    train.validate()?;
    let device = args.training.device.open()?;
    let read: Vec<&Path> = args.data.iter().map(|source| source.path.as_path()).collect();
    let told = json!({ "data": read, "shape": args.shape, "tokens": train.tokens, "seed": train.seed });
    let folder = RunFolder::prepare(&args.out, args.existing, &read, &told)?;
    match train_dense(&args.shape, &train, &args.data, &args.training.text, &folder, &device, stop)? {
        Outcome::Stopped(step) => print(&format_args!("stopped after step {step}; --resume continues"))?,
        Outcome::Finished => print(&format_args!("{}", folder.out().display()))?,
    }
    Ok(())
}

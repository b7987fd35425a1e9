//! `demo`: all steps for the embedded model.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::Device;
use clap::Args;
use serde_json::json;

use super::options::ExistingArgs;
use super::run::tell;
use moefy_train::demo;
use moefy_train::pipeline::run::PlannedRun;
use moefy_train::pipeline::{Lab, RunFolder};
use moefy_train::ranks::Ranks;
use moefy_train::train::Stop;

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
    existing: ExistingArgs,
}

pub fn demo(args: &DemoArgs, stop: &Stop, ranks: &dyn Ranks) -> Result<()> {
    let settings = json!({ "demo": env!("CARGO_PKG_VERSION"), "tokens": args.tokens, "seed": args.seed });
    let folder = RunFolder::prepare(&args.out, args.existing.existing(), &[], &settings, ranks)?;
    let inputs = demo::inputs(&demo::write_base(&folder)?);
    let lab = Lab::open(inputs, &Device::Cpu, stop, ranks)?;
    let run = PlannedRun::new(lab, demo::recipe(args.tokens, args.seed), demo::report_options())?.read()?;
    let outcome = run.run(&folder)?;
    tell(&folder, outcome)
}

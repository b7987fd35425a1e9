//! `run`: all steps for one model.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use dynamoe_model::checkpoint::refuse_overlap;

use super::options::{
    ExistingArgs, ExpertArgs, InputArgs, Methods, TrainingArgs, heading, warn_unless_served,
};
use super::{print, stopped};
use moefy_train::pipeline::run::{EVAL_TOKENS, PlannedRun, ReportOptions};
use moefy_train::pipeline::{Lab, Recipe, RunFolder};
use moefy_train::ranks::Ranks;
use moefy_train::train::{Outcome, Stop};

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// Folder of the finished checkpoint and its report
    #[arg(long, value_name = "DIR", help_heading = heading::OUTPUT)]
    out: PathBuf,
    #[command(flatten)]
    existing: ExistingArgs,
    /// TOML file whose keys are these flags
    #[arg(long, value_name = "FILE", help_heading = heading::OUTPUT)]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = heading::REPORT)]
struct ReportArgs {
    /// Methods to train in the same way for comparison, separated by commas, or none
    #[arg(long, value_name = "METHODS", default_value = "dense,static,random")]
    baselines: Methods,
    /// Also search the best routes with the next token known (the oracle), a bound for routers. Takes as long as
    /// everything else
    #[arg(long)]
    oracle: bool,
    /// Most tokens to measure curves on
    #[arg(long, default_value_t = EVAL_TOKENS)]
    eval_tokens: usize,
    /// Minimal pairs for the report: .jsonl with "good" and "bad"
    #[arg(long, value_name = "PATH")]
    pairs: Option<PathBuf>,
}

impl ReportArgs {
    fn options(&self) -> ReportOptions {
        ReportOptions {
            baselines: self.baselines.0.clone(),
            oracle: self.oracle,
            eval_tokens: self.eval_tokens,
            pairs: self.pairs.clone(),
        }
    }
}

pub fn run(args: &RunArgs, stop: &Stop, ranks: &dyn Ranks) -> Result<()> {
    let device = args.training.steps.device.open()?;
    let recipe = Recipe { experts: args.experts.config(), train: args.training.config()? };
    recipe.train.validate()?;
    let (mut inputs, options) = (args.inputs.inputs(), args.report.options());
    let files: Vec<PathBuf> = inputs.paths().chain(options.pairs.as_deref()).map(Path::to_owned).collect();
    let mut read: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let existing = args.existing.existing();
    RunFolder::check(&args.out, existing, &read)?;
    let earlier = RunFolder::earlier(&args.out, existing)?;
    ranks.first_then_others(|| inputs.fetch(earlier.as_slice()))?;
    let tensorboard = args.training.steps.tensorboard.clone();
    let mut lab = Lab { tensorboard, ..Lab::open(inputs, &device, stop, ranks)? };
    warn_unless_served(lab.model.config());
    lab.plan_own_text(&recipe.train)?;
    let mut planned = PlannedRun::new(lab, recipe, options)?;
    let model = planned.model_dir().to_owned();
    refuse_overlap(&model, &args.out)?;
    read.push(&model);
    let settings = planned.settings()?;
    let prepare = || RunFolder::prepare(&args.out, existing, &read, &settings, ranks);
    let (run, folder) = if planned.writes_text() {
        let folder = prepare()?;
        planned.write_text(&folder)?;
        (planned.read()?, folder)
    } else {
        // text that is wrong leaves no folder, nor takes the place of an earlier one
        (planned.read()?, prepare()?)
    };
    let outcome = run.run(&folder)?;
    tell(&folder, outcome)
}

/// Says how a run ended and what to do next.
pub fn tell(folder: &RunFolder<'_>, outcome: Outcome) -> Result<()> {
    let out = folder.out().display();
    match outcome {
        Outcome::Stopped(step) => stopped(step),
        Outcome::Finished => {
            print(&format_args!("report      {}", folder.out().join("report.html").display()))?;
            print(&format_args!("checkpoint  {out}"))?;
            print(&format_args!(
                "evaluate    moefy-train evaluate --model {out} --data TEXT --budget 0.5,0.75"
            ))?;
            print(&format_args!("serve       dynamoe-serve --model {out} --sensitivity 0.5"))
        }
    }
}

//! `compare`: trains variants with several seeds, and compares them.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::options::{ExpertArgs, InputArgs, Methods, TrainingArgs, heading, warn_unless_served};
use super::print;
use moefy_train::methods::Method;
use moefy_train::pipeline::compare::{Comparison, Variant, compare as run_comparison, earlier, variants};
use moefy_train::pipeline::{Lab, Recipe};
use moefy_train::ranks::Ranks;
use moefy_train::train::Stop;

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    comparison: ComparisonArgs,
    /// Folder of the table and of finished trainings; the same command continues a comparison that was stopped
    #[arg(long, help_heading = heading::OUTPUT)]
    out: PathBuf,
    /// Keep the trained checkpoints, under OUT/checkpoints
    #[arg(long, help_heading = heading::OUTPUT)]
    keep: bool,
    /// TOML file whose keys are these flags
    #[arg(long, value_name = "FILE", help_heading = heading::OUTPUT)]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Comparison")]
struct ComparisonArgs {
    /// TOML file with a [[variant]] for each variant: its name, and the flags in which it differs from this command
    #[arg(long, value_name = "FILE")]
    variants: Option<PathBuf>,
    /// Without --variants: methods to compare --method with, separated by commas, or none
    #[arg(long, value_name = "METHODS", default_value = "dense,static,random,similarity")]
    baselines: Methods,
    /// Number of seeds, counted up from --seed
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Mean widths to compare at
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0])]
    at: Vec<f64>,
    /// Most tokens to measure curves on
    #[arg(long, default_value_t = 100_000)]
    eval_tokens: usize,
    /// Search the oracle of this variant (or of the method with this label), with the first seed
    #[arg(long, value_name = "NAME")]
    oracle: Option<String>,
}

impl CompareArgs {
    fn variants(&self) -> Result<Vec<Variant>> {
        let common = Recipe { experts: self.experts.config(), train: self.training.config()? };
        if let Some(path) = &self.comparison.variants {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("--variants {}", path.display()))?;
            return variants(&text, &common).with_context(|| format!("--variants {}", path.display()));
        }
        let mut methods = self.comparison.baselines.0.clone();
        methods.retain(|method| *method != common.train.method);
        methods.push(common.train.method);
        let variant = |method: Method| {
            let recipe = Recipe { train: common.train.by(method), ..common.clone() };
            Variant { name: method.label().to_owned(), recipe }
        };
        Ok(methods.into_iter().map(variant).collect())
    }
}

pub fn compare(args: &CompareArgs, stop: &Stop, ranks: &dyn Ranks) -> Result<()> {
    let asked = &args.comparison;
    asked.at.iter().try_for_each(|&width| dynamoe::dial::check_dial("--at", width))?;
    ensure!(asked.at.is_sorted(), "--at: expected widths in ascending order, found {:?}", asked.at);
    ensure!(asked.seeds > 0, "--seeds must be 1 or more, found 0");
    let comparison = Comparison {
        variants: args.variants()?,
        seeds: (args.training.steps.seed..).take(asked.seeds as usize).collect(),
        widths: asked.at.clone(),
        eval_tokens: asked.eval_tokens,
        oracle: asked.oracle.clone(),
        keep: args.keep,
    };
    let device = args.training.steps.device.open()?;
    let mut inputs = args.inputs.inputs();
    ranks.first_then_others(|| inputs.fetch(&earlier(&args.out)))?;
    let tensorboard = args.training.steps.tensorboard.clone();
    let mut lab = Lab { tensorboard, ..Lab::open(inputs, &device, stop, ranks)? };
    warn_unless_served(lab.model.config());
    lab.plan_own_text(&args.training.config()?)?;
    match run_comparison(&mut lab, &comparison, &args.out)? {
        Some(table) => {
            print(&format_args!("{}", table.markdown()))?;
            print(&format_args!("{}", args.out.join("report.html").display()))
        }
        None => print(&format_args!("stopped; the same command continues")),
    }
}

//! `compare`: methods and settings × seeds.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::args::{ExpertArgs, InputArgs, TrainingArgs};
use super::print;
use crate::compare::{Comparison, Variant, compare as run_comparison, variants};
use crate::train::{Method, TrainConfig};

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    inputs: InputArgs,
    /// Folder of the table and of finished cells; a comparison that was stopped goes on
    #[arg(long)]
    out: PathBuf,
    /// TOML file with a [[variant]] for each setting: a name, and flags that differ from those given here
    #[arg(long, value_name = "FILE")]
    variants: Option<PathBuf>,
    /// Methods compared with --method, where there is no --variants
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["dense", "static", "random", "similarity"])]
    baselines: Vec<Method>,
    /// Seeds: this many from --seed up
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Mean widths to compare at
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0])]
    at: Vec<f64>,
    /// Tokens on which curves are measured at most
    #[arg(long, default_value_t = 100_000)]
    eval_tokens: usize,
    /// The variant (or method's label) whose oracle is searched, with the first seed
    #[arg(long, value_name = "NAME")]
    oracle: Option<String>,
    /// Keep the trained checkpoints, under OUT/checkpoints
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    experts: ExpertArgs,
    #[command(flatten)]
    training: TrainingArgs,
    /// TOML file whose keys are these flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl CompareArgs {
    fn variants(&self) -> Result<Vec<Variant>> {
        if let Some(path) = &self.variants {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("--variants {}", path.display()))?;
            let found = variants(&text, &self.experts, &self.training.train);
            return found.with_context(|| format!("--variants {}", path.display()));
        }
        let mut methods = self.baselines.clone();
        methods.retain(|method| *method != self.training.train.method);
        methods.push(self.training.train.method);
        let variant = |method: Method| Variant {
            name: method.label().to_owned(),
            experts: self.experts.clone(),
            train: TrainConfig { method, ..self.training.train.clone() },
        };
        Ok(methods.into_iter().map(variant).collect())
    }
}

pub fn compare(args: &CompareArgs, stop: &AtomicBool) -> Result<()> {
    args.at.iter().try_for_each(|&width| dynamoe::config::check_dial("--at", width))?;
    ensure!(args.at.is_sorted(), "--at: expected widths in ascending order, found {:?}", args.at);
    ensure!(args.seeds > 0, "--seeds must be 1 or more, found 0");
    let comparison = Comparison {
        model: args.inputs.model.clone(),
        data: args.inputs.data.clone(),
        valid: args.inputs.valid.clone(),
        variants: args.variants()?,
        seeds: (args.training.train.seed..).take(args.seeds as usize).collect(),
        widths: args.at.clone(),
        eval_tokens: args.eval_tokens,
        oracle: args.oracle.clone(),
        keep: args.keep,
        text: args.training.text.clone(),
    };
    match run_comparison(&comparison, &args.out, &args.training.device.open()?, stop)? {
        Some(table) => {
            print(&format_args!("{}", table.markdown()))?;
            print(&format_args!("{}", args.out.join("report.html").display()))
        }
        None => print(&format_args!("stopped; the same command goes on")),
    }
}

//! `card`: writes a model card into a checkpoint's folder.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::print;
use moefy_train::report::{CardOptions, write_card};

#[derive(Debug, Args)]
pub struct CardArgs {
    /// The checkpoint's folder
    model: PathBuf,
    /// Measurements: a report.json of `run` or `compare`, or curves as `chart` takes them [default: report.json in the
    /// folder, if it is there]
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The Hub's id of the base model [default: the one that the report names]
    #[arg(long, value_name = "ORG/NAME")]
    base_model: Option<String>,
    /// Replace a README.md that this command did not write
    #[arg(long)]
    force: bool,
}

pub fn card(args: &CardArgs) -> Result<()> {
    let options = CardOptions {
        report: args.report.as_deref(),
        base_model: args.base_model.as_deref(),
        force: args.force,
    };
    write_card(&args.model, &options)?;
    print(&format_args!("{}", args.model.join("README.md").display()))
}

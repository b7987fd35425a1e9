//! `report`: writes report.html from a run's report.json again.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::print;
use moefy_train::report::{self, results::Report};

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Folder of a run, with report.json in it
    #[arg(long)]
    run: PathBuf,
    /// Folder to write report.html to [default: the same]
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn report(args: &ReportArgs) -> Result<()> {
    let path = args.run.join("report.json");
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{}: cannot be read; `moefy-train run` writes it", path.display()))?;
    let report: Report =
        serde_json::from_slice(&bytes).with_context(|| format!("{}: not a report", path.display()))?;
    let written = report::write(&report, args.out.as_deref().unwrap_or(&args.run))?;
    print(&format_args!("{}", written.display()))
}

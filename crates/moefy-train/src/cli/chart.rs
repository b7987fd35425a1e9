//! `chart`: draws loss against width as one SVG file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use dynamoe_model::checkpoint::write_atomic;

use super::print;
use moefy_train::report::{curve_svg, read_curves};

#[derive(Debug, Args)]
pub struct ChartArgs {
    /// A report.json of `run` or `compare`, or curves as docs/benchmarks/data keeps them
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE.svg")]
    out: PathBuf,
}

pub fn chart(args: &ChartArgs) -> Result<()> {
    let path = args.data.display();
    let json = std::fs::read(&args.data).with_context(|| format!("--data {path}: cannot be read"))?;
    let drawn = read_curves(&json).and_then(|report| curve_svg(&report));
    write_atomic(&args.out, drawn.with_context(|| format!("--data {path}"))?.as_bytes())?;
    print(&format_args!("{}", args.out.display()))
}

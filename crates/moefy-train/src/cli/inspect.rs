//! `inspect`: says what a checkpoint is.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::print;

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The checkpoint's folder
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    let inspection = dynamoe_model::inspect::inspect(&args.model)?;
    if args.json {
        print(&format_args!("{}", serde_json::to_string_pretty(&inspection)?))
    } else {
        print(&format_args!("{inspection}"))
    }
}

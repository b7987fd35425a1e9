//! `inspect`: says what a checkpoint is.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::options::{TokenizerArg, with_add_on};
use super::print;
use dynamoe_model::inspect::describe;

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The checkpoint: a folder, a hub id or a .gguf file
    model: String,
    #[command(flatten)]
    tokenizer: TokenizerArg,
    /// Add-on that makes a DynaMoE model of it: its folder
    #[arg(long, value_name = "DIR")]
    add_on: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    let inspection = describe(&with_add_on(args.tokenizer.open(&args.model)?, args.add_on.as_deref())?);
    if args.json {
        print(&format_args!("{}", serde_json::to_string_pretty(&inspection)?))
    } else {
        print(&format_args!("{inspection}"))
    }
}

//! `export`: rewrites a checkpoint, as a dense model, in another type or in other shards.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use dynamoe_model::export::{ExportOptions, export as export_checkpoint};

use super::options::open_model;
use super::print;

/// A type of weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The checkpoint
    #[arg(long)]
    model: String,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Leave the routers out: an ordinary model of the base architecture
    #[arg(long)]
    dense: bool,
    /// Type of the weights [default: as they are]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Largest shard in bytes [default: the source's shards]
    #[arg(long)]
    max_shard_bytes: Option<u64>,
    /// Replace an existing output folder
    #[arg(long)]
    force: bool,
}

pub fn export(args: &ExportArgs) -> Result<()> {
    let dtype = args.dtype.map(|dtype| match dtype {
        DtypeArg::F32 => safetensors::Dtype::F32,
        DtypeArg::F16 => safetensors::Dtype::F16,
        DtypeArg::Bf16 => safetensors::Dtype::BF16,
    });
    let options =
        ExportOptions { dense: args.dense, dtype, max_shard_bytes: args.max_shard_bytes, force: args.force };
    export_checkpoint(&open_model(&args.model)?, &options, &args.out)?;
    print(&format_args!("{}", args.out.display()))
}

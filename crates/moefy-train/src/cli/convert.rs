//! `convert`: reorders a dense model's neurons and adds routers.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use dynamoe_model::checkpoint::refuse_overlap;

use super::options::{DenseArgs, ExpertArgs, warn_unless_served};
use super::print;
use moefy_train::prepare::{self, Calibration};

#[derive(Debug, Args)]
pub struct ConvertArgs {
    #[command(flatten)]
    model: DenseArgs,
    /// What `calibrate` wrote; without it neurons are ordered by their weights alone
    #[arg(long)]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    experts: ExpertArgs,
    /// Seed of the routers' weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder of the converted checkpoint
    #[arg(long)]
    out: PathBuf,
    /// Largest shard in bytes [default: the source's shards]
    #[arg(long)]
    max_shard_bytes: Option<u64>,
    /// Replace an existing output folder
    #[arg(long)]
    force: bool,
}

pub fn convert(args: &ConvertArgs) -> Result<()> {
    let source = args.model.open()?;
    refuse_overlap(args.model.path(), &args.out)?;
    warn_unless_served(source.config());
    let mut options = args.experts.config().options(source.config(), args.seed)?;
    options.max_shard_bytes = args.max_shard_bytes;
    options.force = args.force;
    let calibration = args.calibration.as_deref().map(Calibration::load).transpose()?;
    prepare::convert(&source, calibration.as_ref(), &options, &args.out)?;
    print(&format_args!("{}: experts of width {:?}", args.out.display(), options.expert_widths))
}

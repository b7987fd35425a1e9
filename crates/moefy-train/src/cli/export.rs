//! `export`: rewrites a checkpoint, as a dense model, as an add-on to its base, in another type or in other shards.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use dynamoe_model::checkpoint::write_add_on;
use dynamoe_model::export::{ExportOptions, export as export_checkpoint};

use super::options::{open_model, with_add_on};
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
    /// The checkpoint: a folder or a hub id
    #[arg(long)]
    model: String,
    /// Without DIR: write what the checkpoint adds to --base. With DIR: put this add-on and the dense --model together
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    add_on: Option<Option<PathBuf>>,
    /// The dense model that an add-on is written for: a folder or a hub id
    #[arg(long, requires = "add_on", conflicts_with_all = ["dense", "dtype", "max_shard_bytes"])]
    base: Option<String>,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Write an ordinary model of the base architecture, without what DynaMoE added
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
    let model = open_model(&args.model)?;
    match (&args.add_on, &args.base) {
        (Some(None), Some(base)) => {
            let name = base_name(base);
            write_add_on(&model, &open_model(base)?, &name, &args.out, args.force)?;
        }
        (Some(None), None) => {
            bail!("--add-on writes an add-on to the dense model that --base names; give --base")
        }
        (Some(Some(_)), Some(_)) => {
            bail!("--add-on DIR reads an add-on and --base is for writing one; give one of them")
        }
        (add_on, _) => {
            let model = with_add_on(model, add_on.as_ref().and_then(|dir| dir.as_deref()))?;
            export_checkpoint(&model, &args.options(), &args.out)?;
        }
    }
    print(&format_args!("{}", args.out.display()))
}

impl ExportArgs {
    fn options(&self) -> ExportOptions {
        let dtype = self.dtype.map(|dtype| match dtype {
            DtypeArg::F32 => safetensors::Dtype::F32,
            DtypeArg::F16 => safetensors::Dtype::F16,
            DtypeArg::Bf16 => safetensors::Dtype::BF16,
        });
        let (dense, max_shard_bytes, force) = (self.dense, self.max_shard_bytes, self.force);
        ExportOptions { dense, dtype, max_shard_bytes, force }
    }
}

/// A base's name for people: its hub id, or the last part of its path.
fn base_name(base: &str) -> String {
    let path = Path::new(base);
    match path.file_name().filter(|_| path.is_dir()) {
        Some(name) => name.to_string_lossy().into(),
        None => base.to_owned(),
    }
}

//! `export`: rewrites a checkpoint, as a dense model of full or less width, as an add-on to its base, in another type or in other shards.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use dynamoe_model::checkpoint::{refuse_overlap, write_add_on};
use dynamoe_model::export::{ExportOptions, export as export_checkpoint};
use dynamoe_model::slice::{Compensation, Slice, export_slice};
use dynamoe_model::{Checkpoint, hub};

use super::options::{TokenizerArg, with_add_on};
use super::print;
use moefy_train::progress::Progress;

/// A type of weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The checkpoint: a folder, a hub id or a .gguf file
    #[arg(long)]
    model: String,
    #[command(flatten)]
    tokenizer: TokenizerArg,
    /// Without DIR: write what the checkpoint adds to --base. With DIR: put this add-on and the dense --model together
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    add_on: Option<Option<PathBuf>>,
    /// The dense model that an add-on is written for: a folder, a hub id or a .gguf file
    #[arg(long, requires = "add_on", conflicts_with_all = ["dense", "width", "dtype", "max_shard_bytes"])]
    base: Option<String>,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Write an ordinary model of the base architecture, without what DynaMoE added
    #[arg(long)]
    dense: bool,
    /// With --dense: cut the model to this share of its FFNs' width, for all tokens
    #[arg(long, value_name = "WIDTH", requires = "dense")]
    width: Option<f64>,
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
    match (&args.add_on, &args.base) {
        (Some(None), Some(base)) => {
            let model = Checkpoint::open(&hub::resolve(&args.model)?)?;
            write_add_on(&model, &args.tokenizer.open(base)?, &base_name(base), &args.out, args.force)?;
        }
        (Some(None), None) => {
            bail!("--add-on writes an add-on to the dense model that --base names; give --base")
        }
        (Some(Some(_)), Some(_)) => {
            bail!("--add-on DIR reads an add-on and --base is for writing one; give one of them")
        }
        (add_on, _) => {
            refuse_overlap(Path::new(&args.model), &args.out)?;
            let model = args.tokenizer.open(&args.model)?;
            let model = with_add_on(model, add_on.as_ref().and_then(|dir| dir.as_deref()))?;
            match args.width {
                Some(share) => return cut(&model, share, args),
                None => shown(|written| export_checkpoint(&model, &args.options(), &args.out, written))?,
            }
        }
    }
    print(&format_args!("{}", args.out.display()))
}

/// Shows how far an export is, which tells the bytes written and all bytes.
fn shown(export: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<()>) -> Result<()> {
    let mut progress = None;
    export(&mut |done, all| {
        let progress = progress.get_or_insert_with(|| Progress::new("exporting", "bytes", all, 0));
        progress.update(done, String::new());
    })?;
    progress.into_iter().for_each(Progress::finish);
    Ok(())
}

/// Writes an ordinary model of a share of the width, and says what it is made of.
fn cut(model: &Checkpoint, share: f64, args: &ExportArgs) -> Result<()> {
    let slice = Slice::of(model, share)?;
    let config = model.config();
    let (full, experts) = (config.intermediate_size, config.expert_widths());
    if slice.compensation == Compensation::LeftOut {
        tracing::warn!(
            "{}'s FFN has no biases, so the slice goes without compensation: `evaluate` it to see what that costs",
            config.architecture.name()
        );
    }
    if slice.width < experts[0] {
        tracing::warn!("the smallest expert has {} neurons: nothing narrower was trained", experts[0]);
    }
    match slice.width == full {
        true => shown(|written| export_checkpoint(model, &args.options(), &args.out, written))?,
        false => shown(|written| export_slice(model, &slice, &args.options(), &args.out, written))?,
    }
    let compensation = match slice.compensation {
        Compensation::Bias => ", compensation as a bias of down_proj",
        Compensation::LeftOut => ", no compensation",
        Compensation::Nothing => "",
    };
    let separate = match slice.separate {
        0 => String::new(),
        count => format!(", the first {count} with the smaller experts' separate weights"),
    };
    print(&format_args!(
        "{}: {} of {full} neurons in each FFN (a multiple of {}){separate}{compensation}",
        args.out.display(),
        slice.width,
        slice.multiple
    ))
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
    match path.file_name().filter(|_| path.exists()) {
        Some(name) => name.to_string_lossy().into(),
        None => base.to_owned(),
    }
}

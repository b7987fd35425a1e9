//! The single steps: calibrate, convert, finetune, export, report, inspect.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use super::args::{ExpertArgs, TrainingArgs, open_model};
use super::print;
use crate::calibrate::Calibration;
use crate::data::{DataSource, Split};
use crate::run::{Existing, Finetune, RunFolder, describe, publish};
use crate::texts::{CALIBRATION_TOKENS, TextArgs, Texts, calibration};
use crate::train::Outcome;
use crate::train::progress::Progress;
use dynamoe_model::RoutedModel;
use dynamoe_model::checkpoint::{Checkpoint, refuse_overlap};
use dynamoe_model::export::ExportOptions;

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Dense model: a folder or a hub id
    #[arg(long)]
    model: String,
    /// Text: PATH[:WEIGHT], .txt or .jsonl; may be repeated
    #[arg(long, required = true)]
    data: Vec<DataSource>,
    /// Tokens to read
    #[arg(long, default_value_t = CALIBRATION_TOKENS)]
    tokens: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    sequence_length: usize,
    /// File to write
    #[arg(long, default_value = "calibration.safetensors")]
    out: PathBuf,
    #[command(flatten)]
    text: TextArgs,
}

pub fn calibrate(args: &CalibrateArgs) -> Result<()> {
    let source = open_model(&args.model)?;
    let texts = Texts::open(source.dir(), source.config(), &args.text)?;
    let batches = texts.training(&args.data, Split::All, (8, args.sequence_length), 0)?;
    let measured = measure(&source, &calibration(&batches, args.tokens))?;
    measured.save(&args.out)?;
    print(&format_args!(
        "{}: {} tokens, {} layers",
        args.out.display(),
        measured.tokens,
        measured.layers.len()
    ))?;
    Ok(())
}

/// Calibrates with a progress bar.
pub fn measure(source: &Checkpoint, batches: &[crate::data::PaddedBatch]) -> Result<Calibration> {
    let mut progress = Progress::new("calibrating", batches.len() as u64, 0);
    let measured =
        crate::calibrate::calibrate(source, batches, &mut |done| progress.update(done as u64, ""))?;
    progress.finish();
    Ok(measured)
}

#[derive(Debug, Args)]
pub struct ConvertCommand {
    /// Dense model: a folder or a hub id
    #[arg(long)]
    model: String,
    /// What `calibrate` wrote; without it neurons are ordered by their weights alone
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Folder of the converted checkpoint
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    experts: ExpertArgs,
    /// Seed of the routers' weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Largest shard in bytes [default: the source's shards]
    #[arg(long)]
    max_shard_bytes: Option<u64>,
    /// Replace an existing output folder
    #[arg(long)]
    force: bool,
}

pub fn convert(args: &ConvertCommand) -> Result<()> {
    let source = open_model(&args.model)?;
    let mut options = args.experts.options(source.config(), args.seed, args.force)?;
    options.max_shard_bytes = args.max_shard_bytes;
    let calibration = args.calibration.as_deref().map(Calibration::load).transpose()?;
    crate::convert::convert(&source, calibration.as_ref(), &options, &args.out)?;
    print(&format_args!("{}: experts of width {:?}", args.out.display(), options.expert_widths))?;
    Ok(())
}

#[derive(Debug, Args)]
pub struct FinetuneArgs {
    /// Converted model
    #[arg(long)]
    model: String,
    /// Dense model to distill from: a folder or a hub id [default: the model itself, at full width, as it is now]
    #[arg(long)]
    teacher: Option<String>,
    /// Text: PATH[:WEIGHT], .txt or .jsonl; may be repeated
    #[arg(long, required = true)]
    data: Vec<DataSource>,
    /// Folder of the trained checkpoint
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    existing: Existing,
}

pub fn finetune(args: &FinetuneArgs, stop: &AtomicBool) -> Result<()> {
    let TrainingArgs { train, text, .. } = &args.training;
    train.validate()?;
    let read: Vec<&Path> = args.data.iter().map(|data| data.path.as_path()).collect();
    RunFolder::check(&args.out, args.existing, &read)?;
    let device = args.training.device.open()?;
    let source = open_model(&args.model)?;
    let texts = Texts::open(source.dir(), source.config(), text)?;
    let shape = (train.batch_size, train.sequence_length);
    let batches = texts.training(&args.data, Split::All, shape, train.seed)?;
    let teacher = match (&args.teacher, train.has_teacher()) {
        (Some(teacher), true) => Some(RoutedModel::load(&open_model(teacher)?, &device)?),
        (None, true) => Some(RoutedModel::load(&source, &device)?),
        (_, false) => None,
    };
    refuse_overlap(source.dir(), &args.out)?;
    let mut told = describe(&source, &args.data, train, text)?;
    told["teacher"] = args.teacher.as_deref().into();
    let folder = RunFolder::prepare(&args.out, args.existing, &read, &told)?;
    let job = Finetune {
        source: &source,
        teacher: teacher.as_ref(),
        config: train,
        batches: &batches,
        state_dir: Some(&folder.training("state")),
        stop,
        device: &device,
    };
    let (model, outcome, _) = job.run()?;
    if let Outcome::Stopped(step) = outcome {
        print(&format_args!("stopped after step {step}; the same command with --resume continues"))?;
        return Ok(());
    }
    publish(&folder, &source, &model, train.method, &calibration(&batches, CALIBRATION_TOKENS))?;
    print(&format_args!(
        "{}: trained on {} tokens",
        args.out.display(),
        train.steps() * train.tokens_per_step()
    ))?;
    Ok(())
}

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
    dynamoe_model::export::export(&open_model(&args.model)?, &options, &args.out)?;
    print(&format_args!("{}", args.out.display()))?;
    Ok(())
}

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
    let report: crate::results::Report =
        serde_json::from_slice(&bytes).with_context(|| format!("{}: not a report", path.display()))?;
    let written = crate::report::write(&report, args.out.as_deref().unwrap_or(&args.run))?;
    print(&format_args!("{}", written.display()))?;
    Ok(())
}

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
        print(&format_args!("{}", serde_json::to_string_pretty(&inspection)?))?;
    } else {
        print(&format_args!("{inspection}"))?;
    }
    Ok(())
}

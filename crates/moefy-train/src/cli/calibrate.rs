//! `calibrate`: measures a dense model's neurons on text.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::options::{DenseArgs, TextArgs, fetched};
use super::print;
use moefy_train::data::{CALIBRATION_TOKENS, DataSource, SampleShape, Split, Texts, calibration_batches};
use moefy_train::prepare;
use moefy_train::train::TrainConfig;

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: DenseArgs,
    /// Text: PATH[:WEIGHT], a file (.txt, .jsonl, also .gz or .zst, or .parquet), a folder, a pattern of files,
    /// or hf://datasets/ORG/NAME[@REVISION][/PATTERN]; may be repeated
    #[arg(long, required = true, value_parser = DataSource::of_files)]
    data: Vec<DataSource>,
    /// Tokens to read
    #[arg(long, default_value_t = CALIBRATION_TOKENS)]
    tokens: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = TrainConfig::SEQUENCE_LENGTH)]
    sequence_length: usize,
    /// File to write
    #[arg(long, default_value = "calibration.safetensors")]
    out: PathBuf,
    #[command(flatten)]
    text: TextArgs,
}

pub fn calibrate(args: &CalibrateArgs) -> Result<()> {
    let source = args.model.open()?;
    let texts = Texts::open(&source, &args.text.options())?;
    let shape = SampleShape { batch_size: TrainConfig::BATCH_SIZE, sequence_length: args.sequence_length };
    let data = fetched(&args.data)?;
    let batches = texts.training(&data, Split::All, shape, 0)?;
    let measured = prepare::calibrate(&source, &calibration_batches(&batches, args.tokens))?;
    measured.save(&args.out)?;
    print(&format_args!(
        "{}: {} tokens, {} layers",
        args.out.display(),
        measured.tokens,
        measured.layers.len()
    ))
}

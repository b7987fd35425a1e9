//! The embedded default: a small dense Llama that this project trained on text that it generates.
//!
//! The base was made by
//!
//! ```text
//! moefy-train pretrain --out DIR --tokens 4000000 --lr 4e-3 --batch-size 16 --bf16
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::data::corpus::{self, BOUNDARY};
use crate::data::{DataSource, TextOptions};
use crate::methods::Method;
use crate::pipeline::run::{EVAL_TOKENS, ReportOptions};
use crate::pipeline::{HeldOut, Inputs, Recipe, RunFolder};
use crate::train::TrainConfig;

/// The base's files.
const BASE: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("base/config.json")),
    ("model.safetensors", include_bytes!("base/model.safetensors")),
    ("tokenizer.json", include_bytes!("base/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("base/tokenizer_config.json")),
];

/// Tokens that the demo trains on.
pub const TOKENS: u64 = 600_000;
/// Generated documents to train on and to evaluate on; seeds other than the base's.
const TEXTS: [(&str, u64, usize); 2] = [("train.txt", 1001, 2500), ("valid.txt", 1002, 120)];

/// Writes the base and its text into the run's folder; returns the folder they are in.
///
/// # Errors
/// The file system's.
pub fn write_base(folder: &RunFolder<'_>) -> Result<PathBuf> {
    let dir = folder.training("demo-base");
    folder.ranks().first(|| write_files(&dir))?;
    Ok(dir)
}

fn write_files(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    for (name, bytes) in BASE {
        fs::write(dir.join(name), bytes).with_context(|| format!("writing {name}"))?;
    }
    for (name, seed, count) in TEXTS {
        let text = corpus::documents(seed, count).join(&format!("\n{BOUNDARY}\n"));
        fs::write(dir.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

/// What the demo reads.
pub fn inputs(base: &Path) -> Inputs {
    let source = |name: &str| vec![DataSource::local(base.join(name))];
    Inputs {
        model: base.display().to_string(),
        tokenizer: None,
        data: source("train.txt"),
        held_out: HeldOut::Files(source("valid.txt")),
        text: TextOptions { cache_dir: Some(base.join("cache")), ..TextOptions::default() },
    }
}

/// How the demo trains: everything at its default.
pub fn recipe(tokens: u64, seed: u64) -> Recipe {
    Recipe { train: TrainConfig { tokens, seed, ..TrainConfig::default() }, ..Recipe::default() }
}

/// What the demo reports: static nesting beside the result, no oracle, since it takes as long as all the rest.
pub fn report_options() -> ReportOptions {
    ReportOptions { baselines: vec![Method::Static], oracle: false, eval_tokens: EVAL_TOKENS, pairs: None }
}

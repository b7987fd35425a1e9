//! The embedded default: a small dense Llama that this project trained on text that it generates.
//!
//! The base was made by
//!
//! ```text
//! moefy-train pretrain --out DIR --tokens 4000000 --lr 4e-3 --backbone-lr 1 --batch-size 16 --bf16
//! ```

pub mod corpus;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use self::corpus::BOUNDARY;
use crate::data::DataSource;
use crate::run::{Job, RunFolder};
use crate::train::{Method, TrainConfig};

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
pub fn write_base(folder: &RunFolder) -> Result<PathBuf> {
    let dir = folder.training("demo-base");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    for (name, bytes) in BASE {
        fs::write(dir.join(name), bytes).with_context(|| format!("writing {name}"))?;
    }
    for (name, seed, count) in TEXTS {
        let text = corpus::documents(seed, count).join(&format!("\n{BOUNDARY}\n"));
        fs::write(dir.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    Ok(dir)
}

/// What the demo runs: everything at its default, on the base's own kind of text.
pub fn job(base: &Path, tokens: u64, seed: u64) -> Job {
    let source = |name: &str| vec![DataSource { path: base.join(name), weight: 1.0 }];
    let mut job = Job::new(base.display().to_string(), source("train.txt"));
    job.valid = source("valid.txt");
    job.train = TrainConfig { tokens, seed, ..TrainConfig::default() };
    job.baselines = vec![Method::Static];
    job.oracle = false; // it takes as long as all the rest
    job.text.cache_dir = Some(base.join("cache"));
    job
}

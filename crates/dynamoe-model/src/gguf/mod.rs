//! Dense models in llama.cpp's GGUF files, as folders in Hugging Face's layout.
//!
//! [`folder`] turns a file into a folder once and keeps it; everything after that reads the folder. Weights are dequantized as
//! a stream, and written as F32, F16 or BF16. `config`, `weights` and `tokenizer` make the folder's
//! files of what `header` reads.

mod byte_level;
mod config;
mod header;
mod sentencepiece;
mod tokenizer;
mod vocabulary;
mod weights;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::Digest;

use crate::checkpoint::{DEFAULT_SHARD_BYTES, StagedFolder, TensorSpec, Writer, plan_shards};
use crate::config::ModelConfig;
use crate::files::{cache_dir, read_file};
use header::Gguf;

/// Version of the folders' content; with a new one they are made anew.
const VERSION: u8 = 1;

/// The folder of the model in `file`, made now unless it is in the cache (`gguf` in [`cache_dir`]). `tokenizer` is a
/// tokenizer.json that takes the place of the one that the file describes.
///
/// # Errors
/// A file that is no whole GGUF file, of an architecture that is not supported, or whose tokenizer cannot be made exactly; a
/// cache that cannot be written.
pub fn folder(file: &Path, tokenizer: Option<&Path>) -> Result<PathBuf> {
    let (gguf, given) = open(file, tokenizer)?;
    let changed = fs::metadata(file)?.modified()?.duration_since(std::time::UNIX_EPOCH)?.as_nanos();
    let mut digest = gguf.digest.clone().chain_update([VERSION]).chain_update(changed.to_le_bytes());
    digest.update(given.as_deref().unwrap_or_default());
    let key: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    let folder = cache_dir()?.join("gguf").join(format!("{name}-{key}"));
    let whole = || folder.join("config.json").is_file();
    if !whole() {
        // another process may have been faster
        write(&gguf, given.as_deref(), &folder).or_else(|error| if whole() { Ok(()) } else { Err(error) })?;
    }
    Ok(folder)
}

/// Writes the model in `file` as the new folder `out`; [`folder`] says what `tokenizer` is.
///
/// # Errors
/// As [`folder`]; `out` is there already.
pub fn convert(file: &Path, tokenizer: Option<&Path>, out: &Path) -> Result<()> {
    let (gguf, given) = open(file, tokenizer)?;
    write(&gguf, given.as_deref(), out)
}

fn open(file: &Path, tokenizer: Option<&Path>) -> Result<(Gguf, Option<Vec<u8>>)> {
    Ok((Gguf::open(file)?, tokenizer.map(read_tokenizer).transpose()?))
}

/// A tokenizer.json that a user gives.
fn read_tokenizer(path: &Path) -> Result<Vec<u8>> {
    let place = || format!("--tokenizer {}", path.display());
    let bytes = read_file(path).with_context(place)?;
    let value: Value = serde_json::from_slice(&bytes).with_context(place)?;
    ensure!(value.get("model").is_some(), "{}: expected a tokenizer.json, with \"model\"", place());
    Ok(bytes)
}

/// Writes the model as the new folder `out`.
fn write(gguf: &Gguf, tokenizer: Option<&[u8]>, out: &Path) -> Result<()> {
    let json = config::config(gguf)?;
    let config = ModelConfig::from_json(&json)
        .with_context(|| format!("{}: the model that its metadata describes", gguf.path.display()))?;
    let moves = weights::moves(gguf, &config, config::interleaved(&config))?;
    let mut files = tokenizer::files(gguf, tokenizer)?;
    files.insert("config.json", serde_json::to_vec_pretty(&json)?);
    let specs: Vec<_> = moves.iter().map(weights::Move::spec).collect();
    let all: u64 = specs.iter().map(TensorSpec::len).sum();
    let (file, to) = (gguf.path.display(), out.display());
    tracing::info!(
        "{file}: dequantizing into {to} ({} MB); it is kept, and may be deleted",
        all.div_ceil(1_000_000)
    );
    let staged = StagedFolder::create(out, false)?;
    let mut writer = Writer::create(staged.path(), plan_shards(specs.clone(), DEFAULT_SHARD_BYTES))?;
    let (mut done, mut told) = (0, 0);
    for (tensor, spec) in moves.iter().zip(&specs) {
        weights::copy(gguf, tensor, &mut writer)?;
        done += spec.len();
        let percent = done * 100 / all;
        if percent >= told + 10 {
            tracing::info!("dequantizing {file}: {percent} %");
            told = percent;
        }
    }
    writer.finish()?;
    for (name, bytes) in files {
        let path = staged.path().join(name);
        fs::write(&path, bytes).with_context(|| format!("{}: writing", path.display()))?;
    }
    staged.commit()
}

/// Whether a file begins as GGUF files do.
pub fn is_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    path.is_file()
        && fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok()
        && &magic == header::MAGIC
}

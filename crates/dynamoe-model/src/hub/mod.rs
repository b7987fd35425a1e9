//! Where a model comes from: a local folder, a GGUF file, or the Hugging Face hub. And files of the hub's data sets.

mod client;
mod data_set;
mod settings;
#[cfg(test)]
mod testing;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::gguf;
use client::{Hub, Weights};
pub use data_set::{DataSet, is_address};
pub use settings::Settings;

/// The folder of a model given as a local folder, as a GGUF file or as a hub id `org/name`. From the hub: config.json, the
/// tokenizer and the safetensors, into the cache that Python's tools use as well, where files that are there already
/// are not fetched again. [`Settings`] lists the environment variables.
///
/// # Errors
/// None of these, or the hub cannot be reached or does not have the model in safetensors.
pub fn resolve(model: &str) -> Result<PathBuf> {
    resolve_with(model, None)
}

/// The same, with a tokenizer.json for a GGUF file. See [`gguf::folder`].
///
/// # Errors
/// As [`resolve`]; a tokenizer for a model that has one.
pub fn resolve_with(model: &str, tokenizer: Option<&Path>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_file() {
        let named = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
        ensure!(named || gguf::is_gguf(path), "{model}: is a file; give the model's folder, or a .gguf file");
        return gguf::folder(path, tokenizer);
    }
    ensure!(tokenizer.is_none(), "--tokenizer is for a .gguf file; {model} has a tokenizer of its own");
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if !is_hub_id(model) {
        bail!("{model}: no such folder, and not a hub id (org/name) either");
    }
    fetch(model, Weights::Safetensors)
}

/// As [`resolve`], with files of quantized weights in the place of safetensors: `uqff` names them, separated by `;`. Their
/// other shards come with them.
///
/// # Errors
/// As [`resolve`]; a file that the repository does not hold.
pub fn resolve_uqff(model: &str, uqff: &str) -> Result<PathBuf> {
    match !Path::new(model).exists() && is_hub_id(model) {
        true => fetch(model, Weights::Uqff(uqff)),
        false => resolve(model),
    }
}

fn fetch(model: &str, weights: Weights<'_>) -> Result<PathBuf> {
    Hub::new(Settings::from_env()?).fetch(model, weights).with_context(|| {
        format!(
            "{model}: no such folder here, and the Hugging Face hub did not deliver it; without a network give a local folder with config.json and its weights"
        )
    })
}

/// Two names of letters, digits, `-`, `_` and `.` with one slash between.
pub fn is_hub_id(model: &str) -> bool {
    model.split_once('/').is_some_and(|(org, name)| is_plain(org) && is_plain(name))
}

/// Whether this is one plain name: it can be part of a path or of an address without leading anywhere else.
fn is_plain(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_taken_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(resolve(dir.path().to_str().unwrap()).unwrap(), dir.path());
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "").unwrap();
        let error = resolve(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("give the model's folder"), "{error}");
        let error = resolve_with(dir.path().to_str().unwrap(), Some(&file)).unwrap_err().to_string();
        assert!(error.contains("--tokenizer"), "{error}");
    }

    #[test]
    fn what_cannot_be_a_hub_id_is_not_asked_for() {
        for model in ["nothing", "/no/such/folder", "a/b/c", "../x", "org/", "/name", "org/na me", "-x/y", ""]
        {
            let error = resolve(model).unwrap_err().to_string();
            assert!(error.contains("no such folder, and not a hub id"), "{model}: {error}");
        }
        assert!(is_hub_id("meta-llama/Llama-3.2-1B"));
    }
}

//! Where a model comes from: a local folder, or the Hugging Face hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};

/// Files fetched if the repository has them.
const OPTIONAL: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "LICENSE",
];

/// The folder of a model given as a local folder or as a hub id `org/name`. From the hub: config.json, the
/// tokenizer and the safetensors, into hf-hub's cache (`HF_HOME`; `HF_ENDPOINT` names a mirror), where files
/// that are there already are not fetched again.
///
/// # Errors
/// Neither a folder nor a hub id, or the hub cannot be reached or does not have the model in safetensors.
pub fn resolve(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        bail!("{model}: is a file; give the model's folder");
    }
    if !is_hub_id(model) {
        bail!("{model}: no such folder, and not a hub id (org/name) either");
    }
    fetch(model, ApiBuilder::from_env()).with_context(|| {
        format!(
            "{model}: no such folder here, and the Hugging Face hub did not deliver it; without a network give a local folder with config.json and *.safetensors"
        )
    })
}

/// Two names of letters, digits, `-`, `_` and `.` with one slash between.
fn is_hub_id(model: &str) -> bool {
    let plain = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(known)
    };
    model.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name))
}

fn fetch(model: &str, api: ApiBuilder) -> Result<PathBuf> {
    let repo = api.build().context("starting the hub client")?.model(model.to_owned());
    let config = get(&repo, "config.json")?;
    let folder = config.parent().context("the hub's cache has no folder")?.to_path_buf();
    let has: Vec<String> = match repo.info() {
        Ok(info) => info.siblings.into_iter().map(|file| file.rfilename).collect(),
        // no network, but config.json was in the cache: the rest may be as well
        Err(error) => {
            tracing::debug!("the hub's listing of {model} is not available: {error}");
            return Ok(folder);
        }
    };
    for file in OPTIONAL.iter().filter(|file| has.iter().any(|h| h == *file)) {
        get(&repo, file)?;
    }
    let weights: Vec<&String> = has
        .iter()
        .filter(|file| !file.contains('/') && file.starts_with("model"))
        .filter(|file| file.ends_with(".safetensors") || file.ends_with(".safetensors.index.json"))
        .collect();
    if weights.is_empty() {
        bail!("the repository holds no model*.safetensors");
    }
    for file in weights {
        get(&repo, file)?;
    }
    Ok(folder)
}

fn get(repo: &ApiRepo, file: &str) -> Result<PathBuf> {
    repo.get(file).with_context(|| format!("fetching {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_taken_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(resolve(dir.path().to_str().unwrap()).unwrap(), dir.path());
        let file = dir.path().join("model.gguf");
        std::fs::write(&file, "").unwrap();
        let error = resolve(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("give the model's folder"), "{error}");
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

    #[test]
    fn without_a_network_the_file_asked_for_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let api = ApiBuilder::new()
            .with_endpoint("http://127.0.0.1:9".to_owned()) // the discard port: refused at once
            .with_cache_dir(cache.path().to_path_buf())
            .with_token(None);
        let error = fetch("org/name", api).unwrap_err();
        assert!(format!("{error:#}").starts_with("fetching config.json: "), "{error:#}");
    }

    #[test]
    fn a_model_in_the_cache_needs_no_network() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--org--name");
        let folder = repo.join("snapshots/abc");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        let api = ApiBuilder::new()
            .with_endpoint("http://127.0.0.1:9".to_owned())
            .with_cache_dir(cache.path().to_path_buf());
        assert_eq!(fetch("org/name", api).unwrap(), folder);
    }
}

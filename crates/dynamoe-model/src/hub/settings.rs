//! How the hub is reached: the environment variables that every Python tool of Hugging Face honours.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where the hub is when `HF_ENDPOINT` does not say.
const ENDPOINT: &str = "https://huggingface.co";

/// How to reach the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its address, without a slash at the end: `HF_ENDPOINT`.
    pub endpoint: String,
    /// The token of gated and private models: `HF_TOKEN`, or the file that `hf auth login` writes (`HF_TOKEN_PATH`).
    pub token: Option<String>,
    /// The folder of models that were fetched: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// Whether to take what the cache holds and ask nothing: `HF_HUB_OFFLINE`.
    pub offline: bool,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// There is no home directory, and no variable that names the cache either.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        // a variable that is set to nothing counts as unset, as in Python
        let first = |names: &[&str]| {
            names.iter().find_map(|name| {
                variable(name).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty())
            })
        };
        let folder = |names: &[&str]| first(names).map(|path| expand_home(&path, variable));
        let home = match folder(&["HF_HOME"]) {
            Some(home) => Some(home),
            None => folder(&["XDG_CACHE_HOME"])
                .or_else(|| first(&["HOME"]).map(|home| PathBuf::from(home).join(".cache")))
                .map(|cache| cache.join("huggingface")),
        };
        let token_file = folder(&["HF_TOKEN_PATH"]).or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(|| {
            let text = std::fs::read_to_string(token_file?).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        });
        let cache = folder(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
            .or_else(|| home.map(|home| home.join("hub")))
            .context("no folder for models from the hub: set HF_HOME")?;
        let on = |name| {
            first(&[name]).is_some_and(|value| {
                ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
            })
        };
        let endpoint = first(&["HF_ENDPOINT"]).unwrap_or_else(|| ENDPOINT.to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            cache,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
        })
    }
}

/// A path whose `~` is the home directory.
fn expand_home(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    match (path.strip_prefix("~/"), variable("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let get =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned());
        Settings::from_variables(&get).unwrap()
    }

    #[test]
    fn the_variables_of_pythons_tools_are_honoured() {
        let plain = settings(&[("HOME", "/home/a")]);
        assert_eq!(plain.endpoint, ENDPOINT);
        assert_eq!((plain.cache, plain.offline), ("/home/a/.cache/huggingface/hub".into(), false));
        let cache = |variables| settings(variables).cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), "/h/hf/hub");
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), "/c");
        let set = settings(&[
            ("HF_HOME", "/hf"),
            ("HF_TOKEN", " hf_x "),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "YES"),
        ]);
        assert_eq!(
            (set.token.as_deref(), set.endpoint.as_str(), set.offline),
            (Some("hf_x"), "http://mirror", true)
        );
        assert!(!settings(&[("HF_HOME", "/hf"), ("HF_HUB_OFFLINE", "0")]).offline);
        assert!(Settings::from_variables(&|_| None).is_err());
    }

    #[test]
    fn a_token_is_read_from_the_file_of_a_login() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(settings(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        assert_eq!(settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_x")]).token.as_deref(), Some("hf_x"));
        assert_eq!(settings(&[("HF_HOME", home), ("HF_TOKEN", "")]).token.as_deref(), Some("hf_file"));
        let other = dir.path().join("nothing");
        assert_eq!(settings(&[("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap())]).token, None);
    }
}

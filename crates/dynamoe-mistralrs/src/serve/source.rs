//! Where the model is: a folder, the hub, or what a TOML file says.
//!
//! mistral.rs has a client of the hub of its own, which knows fewer of the environment's variables than Python's tools. So
//! models are fetched here, and the engine gets folders.

use std::{io::Write, path::Path};

use anyhow::{Context, Result};
use dynamoe_model::{files::read_text, hub};
use mistralrs_core::ModelSelected;
use tempfile::NamedTempFile;

use super::options::{Options, folder};

/// The engine's way to say which model to load.
pub(super) enum Selected {
    Model(Box<ModelSelected>),
    /// A TOML file, rewritten.
    Toml(NamedTempFile),
}

impl Selected {
    /// What the command line asks for. A model on the hub is fetched.
    ///
    /// # Errors
    /// A model that is neither a folder nor on the hub, a TOML file that is none.
    pub fn of(options: &Options) -> Result<Self> {
        let Some(file) = &options.config else {
            return Ok(Self::Model(Box::new(options.model_selected()?)));
        };
        let text = read_text(file).with_context(|| format!("--config {}", file.display()))?;
        let text = with_folder(&text).with_context(|| format!("--config {}", file.display()))?;
        let mut rewritten =
            tempfile::Builder::new().suffix(".toml").tempfile().context("a temporary file")?;
        rewritten.write_all(text.as_bytes()).context("a temporary file")?;
        Ok(Self::Toml(rewritten))
    }

    /// What the engine is told.
    pub fn model(&self) -> ModelSelected {
        match self {
            Self::Model(model) => (**model).clone(),
            Self::Toml(file) => ModelSelected::Toml { file: file.path().display().to_string() },
        }
    }
}

/// A TOML file of mistral.rs's with the folder in the place of a hub id. Other selections than of one plain model stay as
/// they are.
fn with_folder(text: &str) -> Result<String> {
    let mut toml: toml::Table = text.parse().context("not TOML")?;
    let Some(toml::Value::Table(model)) = toml.get_mut("model") else { return Ok(text.to_owned()) };
    let adapters = ["adapters_model_id", "quantized_model_id", "xlora_model_id"];
    let Some(id) = model.get("model_id").and_then(toml::Value::as_str) else { return Ok(text.to_owned()) };
    if adapters.iter().any(|key| model.contains_key(*key)) || !is_on_hub(id) {
        return Ok(text.to_owned());
    }
    let found = folder(id, model.get("from_uqff").and_then(toml::Value::as_str))?;
    model.insert("model_id".into(), found.display().to_string().into());
    Ok(toml.to_string())
}

fn is_on_hub(id: &str) -> bool {
    hub::is_hub_id(id) && !Path::new(id).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_toml_file_with_a_folder_stays_as_it_is() {
        for text in [
            "[model]\nmodel_id = \"/some/folder\" # a comment\n",
            "[model]\nmodel_id = \"org/name\"\nadapters_model_id = \"org/adapters\"\n",
            "# nothing\n",
        ] {
            assert_eq!(with_folder(text).unwrap(), text);
        }
        assert!(format!("{:#}", with_folder("[model").unwrap_err()).contains("not TOML"));
    }

    #[test]
    fn a_toml_file_that_is_missing_is_named() {
        let words = ["dynamoe-serve", "--config", "/no/such.toml"];
        let options = <Options as clap::Parser>::try_parse_from(words).unwrap();
        let error = format!("{:#}", Selected::of(&options).map(|_| ()).unwrap_err());
        assert!(error.contains("/no/such.toml"), "{error}");
    }
}

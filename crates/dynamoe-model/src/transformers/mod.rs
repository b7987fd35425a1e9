//! Code by which Hugging Face's transformers loads a DynaMoE model (`trust_remote_code=True`). Every checkpoint carries it.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The files, by their names in a checkpoint's folder.
const FILES: [(&str, &str); 2] = [
    ("configuration_dynamoe.py", include_str!("configuration_dynamoe.py")),
    ("modeling_dynamoe.py", include_str!("modeling_dynamoe.py")),
];

/// config.json's `auto_map`: which class of the files transformers takes for which of its own.
pub fn auto_map() -> Value {
    json!({
        "AutoConfig": "configuration_dynamoe.DynaMoeConfig",
        "AutoModelForCausalLM": "modeling_dynamoe.DynaMoeForCausalLM",
    })
}

/// Writes the files into the folder of a checkpoint.
///
/// # Errors
/// A folder that cannot be written.
pub fn write_code(folder: &Path) -> Result<()> {
    FILES.iter().try_for_each(|(name, text)| {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("{}: writing", path.display()))
    })
}

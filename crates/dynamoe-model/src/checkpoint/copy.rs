//! From one checkpoint to another: tensors copied in chunks, config.json edited in place, companion files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dynamoe::config::{ARCHITECTURE, DynaMoeConfig, MODEL_TYPE};
use dynamoe::tensors;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::layout::CHUNK_BYTES;
use super::reader::{Checkpoint, float_dtype};
use super::staged::{StagedFolder, refuse_overlap};
use super::writer::{TensorSpec, Writer, check_finite, to_bytes};
use crate::config::{ModelConfig, remove_not_finite};
use crate::files::read_file;
use crate::tensors::expected_tensors;
use crate::transformers;

/// Beginnings of the names of files that belong to a model besides its weights and config.json.
const COMPANIONS: [&str; 11] = [
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "generation_config",
    "chat_template",
    "LICENSE",
    "LICENCE",
    "NOTICE",
    "USE_POLICY",
];

impl Checkpoint {
    /// What its files hold, file by file: the plan that keeps its sharding.
    pub fn plan(&self) -> Vec<Vec<TensorSpec>> {
        let mut shards = vec![Vec::new(); self.shards().len()];
        for name in self.names() {
            let Some(info) = self.info(name) else { continue };
            shards[info.shard].push(TensorSpec {
                name: name.to_owned(),
                dtype: info.dtype,
                shape: info.shape.clone(),
            });
        }
        shards
    }
}

/// Makes a config.json that of a DynaMoE model, or updates its section; all other keys stay.
///
/// # Errors
/// A section that does not fit the rest.
pub fn set_section(config: &mut Value, section: &DynaMoeConfig) -> Result<()> {
    let number = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
    section.validate(number("intermediate_size"), number("num_hidden_layers"))?; // JSON would lose a NaN
    config["architectures"] = json!([ARCHITECTURE]);
    config["model_type"] = json!(MODEL_TYPE);
    config["auto_map"] = transformers::auto_map();
    config["dynamoe"] = serde_json::to_value(section)?;
    ModelConfig::from_json(config).map(drop)
}

/// Makes a DynaMoE model's config.json that of its base again.
///
/// # Errors
/// It is not a DynaMoE model's.
pub fn remove_section(config: &mut Value) -> Result<()> {
    let section = DynaMoeConfig::from_config_json(config)?;
    config["architectures"] = json!([section.base_architecture]);
    config["model_type"] = json!(section.base_model_type);
    // shift_remove keeps the order of the keys that stay
    let keys = config.as_object_mut().context("config.json is not an object")?;
    keys.shift_remove("dynamoe");
    keys.shift_remove("auto_map");
    Ok(())
}

/// Writes `weights`, and what else `source` holds, as a new checkpoint in the source's types and sharding,
/// with `section` (if given) as its `dynamoe` section; additions to the base that the section has no use for are left
/// out. `written` is told the bytes of each tensor once it is written.
///
/// # Errors
/// A weight that the source does not have or of another shape, a value that is not finite, a failed read or
/// write. Nothing is left then.
pub fn save_model(
    source: &Checkpoint,
    weights: &BTreeMap<String, Tensor>,
    section: Option<&DynaMoeConfig>,
    out: &Path,
    written: &mut dyn FnMut(u64),
) -> Result<()> {
    for (name, tensor) in weights {
        let info = source.info(name).with_context(|| {
            format!("{}: has no tensor {name}, it cannot be saved in its place", source.dir().display())
        })?;
        ensure!(info.shape == tensor.dims(), "{name}: expected {:?}, found {:?}", info.shape, tensor.dims());
    }
    let mut config = source.json().clone();
    if let Some(section) = section {
        set_section(&mut config, section)?;
    }
    let wanted: BTreeSet<String> =
        expected_tensors(&ModelConfig::from_json(&config)?).into_iter().map(|(name, _)| name).collect();
    let mut plan = source.plan();
    for shard in &mut plan {
        let kept =
            |name: &str| wanted.contains(name) || tensors::is_order(name) || !tensors::is_addition(name);
        shard.retain(|spec| kept(&spec.name));
    }
    plan.retain(|shard| !shard.is_empty());
    let specs: Vec<_> = plan.iter().flatten().cloned().collect();
    write_folder(source, &config, plan, out, false, |writer| {
        specs.iter().try_for_each(|spec| {
            match weights.get(&spec.name) {
                Some(tensor) => writer.push_tensor(&spec.name, tensor, spec.dtype)?,
                None => copy_tensor(source, &spec.name, spec.dtype, writer)?,
            }
            written(spec.len());
            Ok(())
        })
    })
}

/// A new model folder: config.json, the source's companion files, and the planned tensors, which `fill` pushes.
pub fn write_folder(
    source: &Checkpoint,
    config: &Value,
    plan: Vec<Vec<TensorSpec>>,
    out: &Path,
    force: bool,
    fill: impl FnOnce(&mut Writer) -> Result<()>,
) -> Result<()> {
    refuse_overlap(source.dir(), out)?;
    let staged = StagedFolder::create(out, force)?;
    let mut writer = Writer::create(staged.path(), plan)?;
    fill(&mut writer)?;
    writer.finish()?;
    let path = staged.path().join("config.json");
    std::fs::write(&path, pretty(config)?).with_context(|| format!("{}: writing", path.display()))?;
    copy_companions(source.dir(), staged.path())?;
    if config.get("dynamoe").is_some() {
        transformers::write_code(staged.path())?;
    }
    staged.commit()
}

/// Copies a tensor in chunks, converted to `dtype`; checks that its values are finite.
pub fn copy_tensor(source: &Checkpoint, name: &str, dtype: Dtype, writer: &mut Writer) -> Result<()> {
    let info = source.info(name).with_context(|| format!("tensor {name} not found"))?;
    let element = (info.dtype.bitsize() / 8).max(1);
    for start in (0..info.len).step_by(CHUNK_BYTES) {
        let mut bytes = source.read_range(name, start..info.len.min(start + CHUNK_BYTES))?;
        check_finite(name, &bytes, info.dtype, &info.shape, start / element)?;
        if dtype != info.dtype {
            let stored = float_dtype(info.dtype).with_context(|| format!("tensor {name}: not a float"))?;
            let chunk = Tensor::from_raw_buffer(&bytes, stored, &[bytes.len() / element], &Device::Cpu)?;
            bytes = to_bytes(&chunk, dtype).with_context(|| format!("tensor {name}"))?;
            check_finite(name, &bytes, dtype, &info.shape, start / element)?;
        }
        writer.push(name, &bytes)?;
    }
    Ok(())
}

fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry.with_context(|| from.display().to_string())?;
        let name = entry.file_name();
        let known = COMPANIONS.iter().any(|start| name.to_string_lossy().starts_with(start));
        if known && entry.path().is_file() {
            let copying = || format!("{}: copying", entry.path().display());
            check_link(from, &entry.path()).with_context(copying)?;
            // not fs::copy: a read-only original must not make a read-only copy
            let bytes = read_file(&entry.path()).with_context(copying)?;
            std::fs::write(to.join(&name), bytes).with_context(copying)?;
        }
    }
    Ok(())
}

/// Refuses a link out of the model's folder, except into the store of the hub's cache (`blobs`, two folders up), whose
/// snapshots are links: a copy would give away what it points to.
fn check_link(folder: &Path, file: &Path) -> Result<()> {
    let (folder, target) = (std::fs::canonicalize(folder)?, std::fs::canonicalize(file)?);
    let store = folder.parent().and_then(Path::parent).map(|repository| repository.join("blobs"));
    ensure!(
        target.starts_with(&folder) || store.is_some_and(|store| target.starts_with(store)),
        "it is a link to {} outside of the model's folder; put a copy of the file in its place, or remove it",
        target.display()
    );
    Ok(())
}

/// The text of a config.json. Keys whose numbers are not finite are left out: JSON cannot hold these, and Python's
/// default for them is better than a text that only Python reads.
pub(super) fn pretty(config: &Value) -> Result<Vec<u8>> {
    let mut config = config.clone();
    for key in remove_not_finite(&mut config) {
        tracing::warn!("config.json: \"{key}\" is not a finite number and is left out of what is written");
    }
    let mut text = serde_json::to_vec_pretty(&config)?;
    text.push(b'\n');
    Ok(text)
}

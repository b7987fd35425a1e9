//! Add-ons: what a DynaMoE model has beyond a base whose weights it leaves as they are.
//!
//! docs/checkpoint-format.md specifies the folder. [`write_add_on`] makes one of a checkpoint, and
//! [`Checkpoint::with_add_on`] puts base and add-on together, as a checkpoint that reads like any other.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dynamoe::DynaMoeConfig;
use dynamoe::tensors::{self, is_addition};
use serde::{Deserialize, Serialize};

use super::copy::{copy_tensor, pretty, remove_section, set_section};
use super::layout::{ADD_ON_CONFIG, ADD_ON_TENSORS};
use super::order::{Order, checked, inverse, of_layer};
use super::reader::{Checkpoint, open_shard};
use super::staged::{StagedFolder, refuse_overlap, write_atomic};
use super::writer::{TensorSpec, Writer};
use crate::config::ModelConfig;
use crate::files::read_file;

/// The version of the format that this program writes, and the newest that it reads.
pub const ADD_ON_VERSION: u32 = 1;

/// The content of [`ADD_ON_CONFIG`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddOn {
    /// Version of the format.
    pub version: u32,
    /// The model that it belongs to.
    pub base: Base,
    /// As in a checkpoint's config.json.
    pub dynamoe: DynaMoeConfig,
}

/// What an add-on says of its base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// A name for people, such as its hub id.
    pub name: String,
    /// [`Checkpoint::content_fingerprint`].
    pub sha256: String,
}

impl AddOn {
    /// Reads an add-on's description.
    ///
    /// # Errors
    /// A folder that is no add-on; a newer version.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(ADD_ON_CONFIG);
        let text = read_file(&path)
            .with_context(|| format!("{}: cannot be read; an add-on is a folder with it", path.display()))?;
        // the version first: a newer one may have other keys
        let value: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        ensure!(
            version.is_some_and(|version| (1..=u64::from(ADD_ON_VERSION)).contains(&version)),
            "{}: expected \"version\" from 1 to {ADD_ON_VERSION}, found {}; a newer program may read it",
            path.display(),
            value.get("version").unwrap_or(&serde_json::Value::Null)
        );
        serde_json::from_value(value).with_context(|| path.display().to_string())
    }

    /// The file's text.
    fn text(&self) -> Result<Vec<u8>> {
        pretty(&serde_json::to_value(self)?)
    }
}

impl Checkpoint {
    /// The DynaMoE model of this base and an add-on.
    ///
    /// # Errors
    /// An add-on to another model, a broken one, or a base that is a DynaMoE checkpoint itself.
    pub fn with_add_on(mut self, dir: &Path) -> Result<Self> {
        let add_on = AddOn::read(dir)?;
        ensure!(
            self.config.dynamoe.is_none(),
            "{}: a DynaMoE checkpoint; an add-on belongs to a dense model",
            self.dir.display()
        );
        let found = self.content_fingerprint()?;
        ensure!(
            found == add_on.base.sha256,
            "{}: belongs to {} (fingerprint {:.12}…), and {} is another model ({found:.12}…)",
            dir.display(),
            add_on.base.name,
            add_on.base.sha256,
            self.dir.display()
        );
        set_section(&mut self.json, &add_on.dynamoe)
            .with_context(|| dir.join(ADD_ON_CONFIG).display().to_string())?;
        let dense = self.config.clone();
        let config = ModelConfig::from_json(&self.json)?;
        ensure!(
            config.architecture == dense.architecture,
            "{}: the add-on's base_architecture is {}, that of {} is {}",
            dir.display(),
            config.architecture.name(),
            self.dir.display(),
            dense.architecture.name()
        );
        self.config = ModelConfig { dynamoe: config.dynamoe, ..dense };
        let (shard, tensors) = open_shard(&dir.join(ADD_ON_TENSORS), self.shards.len())?;
        if let Some(name) = tensors.keys().find(|name| !is_addition(name)) {
            bail!("{}: tensor {name} is no part of an add-on", dir.join(ADD_ON_TENSORS).display());
        }
        self.shards.push(shard);
        self.tensors.extend(tensors);
        self.add_on = Some(dir.to_path_buf());
        self.check_tensors()?;
        for layer in 0..self.config.num_hidden_layers {
            let order = self.order(layer)?;
            let order =
                order.with_context(|| format!("{}: no order of layer {layer}'s neurons", dir.display()))?;
            self.orders.extend(of_layer(layer, &order));
        }
        Ok(self)
    }

    /// The dense model in a DynaMoE checkpoint, with its neurons in the base's order if the checkpoint knows it.
    ///
    /// # Errors
    /// A checkpoint that is dense already, a broken order of neurons.
    pub fn dense(&self) -> Result<Self> {
        ensure!(
            self.config.dynamoe.is_some(),
            "{}: is a dense model already; --dense is for DynaMoE checkpoints",
            self.dir.display()
        );
        let mut dense = self.clone();
        for layer in 0..self.config.num_hidden_layers {
            let Some(order) = self.order(layer)? else { continue };
            for (name, order) in of_layer(layer, &inverse(&order)) {
                // the files of a base with an add-on are in the base's order
                if dense.orders.remove(&name).is_none() {
                    dense.orders.insert(name, order);
                }
            }
        }
        remove_section(&mut dense.json)?;
        dense.config.dynamoe = None;
        dense.add_on = None;
        dense.tensors.retain(|name, _| !is_addition(name));
        Ok(dense)
    }

    /// Replaces the `dynamoe` section, such as with a new table of budgets: in config.json or, if the checkpoint is a base
    /// with an add-on, in the add-on.
    ///
    /// # Errors
    /// A dense model; a section that does not fit the model; the file cannot be written.
    pub fn store_section(&mut self, section: &DynaMoeConfig) -> Result<()> {
        DynaMoeConfig::from_config_json(&self.json)?;
        set_section(&mut self.json, section)?;
        self.config.dynamoe = Some(section.clone());
        match &self.add_on {
            Some(dir) => {
                let add_on = AddOn { dynamoe: section.clone(), ..AddOn::read(dir)? };
                write_atomic(&dir.join(ADD_ON_CONFIG), &add_on.text()?)
            }
            None => write_atomic(&self.dir.join("config.json"), &pretty(&self.json)?),
        }
    }

    /// Where each neuron of a layer stood in the base's FFN; none if the checkpoint does not say so.
    ///
    /// # Errors
    /// A list that does not name every neuron once; a failed read.
    fn order(&self, layer: usize) -> Result<Option<Order>> {
        let name = tensors::full_name(layer, tensors::ORDER);
        if self.info(&name).is_none() {
            return Ok(None);
        }
        let shape = [self.config().intermediate_size];
        let order = self.tensor(&name, &shape, DType::F32, &Device::Cpu)?;
        let order = checked(&order.to_vec1()?);
        order.map(Some).with_context(|| format!("{}: tensor {name}", self.dir().display()))
    }
}

/// Writes what `source` has beyond `base`, which is called `name`, as an add-on in the new folder `out`.
///
/// # Errors
/// A source whose dense weights are not the base's, or that does not know the order of its neurons; the file system's.
/// Nothing is left then.
pub fn write_add_on(
    source: &Checkpoint,
    base: &Checkpoint,
    name: &str,
    out: &Path,
    force: bool,
) -> Result<()> {
    let section = source.config.dynamoe.clone();
    let section =
        section.with_context(|| format!("{}: a dense model has nothing to add", source.dir.display()))?;
    for layer in 0..source.config.num_hidden_layers {
        ensure!(
            source.order(layer)?.is_some(),
            "{}: does not know the order of its neurons; convert the base again",
            source.dir.display()
        );
    }
    for dir in [&source.dir, &base.dir] {
        refuse_overlap(dir, out)?;
    }
    let staged = StagedFolder::create(out, force)?;
    let additions = source.plan().into_iter().flatten().filter(|spec| is_addition(&spec.name));
    let additions: Vec<TensorSpec> = additions.collect();
    let mut writer = Writer::create_file(staged.path().join(ADD_ON_TENSORS), additions.clone())?;
    additions.iter().try_for_each(|spec| copy_tensor(source, &spec.name, spec.dtype, &mut writer))?;
    writer.finish()?;
    let sha256 = base.content_fingerprint()?;
    ensure!(
        source.dense()?.content_fingerprint()? == sha256,
        "{}: its dense weights are not those of {name}: only what was trained with --train added makes an add-on",
        source.dir.display()
    );
    let add_on =
        AddOn { version: ADD_ON_VERSION, base: Base { name: name.to_owned(), sha256 }, dynamoe: section };
    let path = staged.path().join(ADD_ON_CONFIG);
    fs::write(&path, add_on.text()?).with_context(|| format!("{}: writing", path.display()))?;
    staged.commit()
}

//! Reading a checkpoint folder, which is trusted with nothing: every name, offset and shape is checked before
//! it is used, and no allocation is larger than the file behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::{Dtype, tensor::Metadata};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::layout::{ADD_ON_CONFIG, CHUNK_BYTES, INDEX, SINGLE, TensorInfo};
use super::order::{Orders, read_ordered};
use super::writer::check_finite;
use crate::config::{ModelConfig, read_json};
use crate::files::read_file;
use crate::tensors::{EMBEDDING, LM_HEAD, expected_tensors};

/// The safetensors crate's own limit.
const MAX_HEADER_LEN: u64 = 100_000_000;

#[derive(Clone)]
pub(super) struct Shard {
    path: PathBuf,
    file: Arc<File>,
    header_len: u64,
}

/// An open checkpoint: a folder with config.json and model.safetensors, or model.safetensors.index.json and
/// its shards. Data is read on demand with positioned reads, so what stays in memory is what the caller keeps.
#[derive(Clone)]
pub struct Checkpoint {
    pub(super) dir: PathBuf,
    pub(super) config: ModelConfig,
    /// What config.json would be if the checkpoint stood alone.
    pub(super) json: Value,
    pub(super) shards: Vec<Shard>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    /// Matrices that are read in another order than they are stored in.
    pub(super) orders: Orders,
    /// The add-on's folder, if the checkpoint is a base with one.
    pub(super) add_on: Option<PathBuf>,
}

impl Checkpoint {
    /// Opens a folder and checks that every tensor that its config.json asks for is there, with the right
    /// shape and a floating-point type.
    ///
    /// # Errors
    /// What is missing, broken or not supported, by file and tensor.
    pub fn open(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "{}: not a folder; a model is a folder with config.json", dir.display());
        let (config, json) = (ModelConfig::read(dir)?, read_json(dir)?);
        let (shards, tensors) = if dir.join(SINGLE).exists() {
            let (shard, found) = open_shard(&dir.join(SINGLE), 0)?;
            (vec![shard], found)
        } else if dir.join(INDEX).exists() {
            open_sharded(dir)?
        } else {
            bail!("{}: neither {SINGLE} nor {INDEX} found: safetensors weights are needed", dir.display());
        };
        let tensors = with_prefix(tensors);
        let (dir, orders) = (dir.to_path_buf(), Orders::new());
        let mut checkpoint = Self { dir, config, json, shards, tensors, orders, add_on: None };
        checkpoint.check_tensors()?;
        checkpoint.drop_alias()?;
        Ok(checkpoint)
    }

    /// Forgets the output matrix of a model whose config.json says that it is the embedding: what is written then holds
    /// the one matrix that is trained, and no second one that stays as it was.
    fn drop_alias(&mut self) -> Result<()> {
        if !self.config.tie_word_embeddings || !self.tensors.contains_key(LM_HEAD) {
            return Ok(());
        }
        ensure!(
            self.holds_the_same(LM_HEAD, EMBEDDING)?,
            "{}: tensor {LM_HEAD} differs from {EMBEDDING}, but config.json has \"tie_word_embeddings\": true, which makes \
             them one: set it to false if the model has an output matrix of its own, or else remove {LM_HEAD}",
            self.dir.display()
        );
        self.tensors.remove(LM_HEAD);
        Ok(())
    }

    /// Whether two tensors have the same type, shape and bytes.
    fn holds_the_same(&self, a: &str, b: &str) -> Result<bool> {
        let (first, second) = (self.known(a)?, self.known(b)?);
        if (first.dtype, &first.shape) != (second.dtype, &second.shape) {
            return Ok(false);
        }
        let len = first.len;
        for start in (0..len).step_by(CHUNK_BYTES) {
            let range = start..len.min(start + CHUNK_BYTES);
            if self.read_range(a, range.clone())? != self.read_range(b, range)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its config.json.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its config.json as it is written with it.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// Names the token that ends a document, for what is written from this checkpoint. Its files stay as they are.
    pub fn set_closing_token(&mut self, id: u32) {
        self.config.closing_token_id = Some(id);
        self.json["closing_token_id"] = id.into();
    }

    /// The add-on's folder, if it is a base with an add-on.
    pub fn add_on(&self) -> Option<&Path> {
        self.add_on.as_deref()
    }

    /// Names of all tensors, sorted; more than [`expected_tensors`] if the files hold more.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The safetensors files.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The type that the model's matrices are stored in (the embedding's).
    pub fn dtype(&self) -> Dtype {
        self.tensors.get(EMBEDDING).map_or(Dtype::F32, |info| info.dtype)
    }

    /// A tensor's bytes, little endian, rows first.
    ///
    /// # Errors
    /// An unknown name or a failed read.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let len = self.known(name)?.len;
        self.read_range(name, 0..len)
    }

    /// Bytes `range` of a tensor.
    ///
    /// # Errors
    /// An unknown name, a range beyond the tensor or a failed read.
    pub fn read_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let info = self.known(name)?;
        ensure!(
            range.start <= range.end && range.end <= info.len,
            "{}: tensor {name}: bytes {range:?} asked for, it has {}",
            self.shards[info.shard].path.display(),
            info.len
        );
        match self.orders.get(name) {
            Some(order) => {
                read_ordered(name, info, order, range, |range| self.read_stored(name, info, range))
            }
            None => self.read_stored(name, info, range),
        }
    }

    /// Bytes `range` of a tensor as it is stored.
    fn read_stored(&self, name: &str, info: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        let shard = &self.shards[info.shard];
        let mut bytes = vec![0; range.len()];
        shard
            .file
            .read_exact_at(&mut bytes, info.offset + range.start as u64)
            .with_context(|| format!("{}: reading tensor {name}", shard.path.display()))?;
        Ok(bytes)
    }

    /// A tensor of the expected shape, converted to `dtype`, on `device`.
    ///
    /// # Errors
    /// An unknown name, another shape, a type other than F32, F16 and BF16, a value that is NaN or infinite, a failed
    /// read.
    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let stored = self.check(name, shape)?;
        let bytes = self.read_bytes(name)?;
        check_finite(name, &bytes, self.known(name)?.dtype, shape, 0)
            .with_context(|| self.dir.display().to_string())?;
        let tensor = Tensor::from_raw_buffer(&bytes, stored, shape, &Device::Cpu)
            .and_then(|t| t.to_device(device)?.to_dtype(dtype));
        tensor.with_context(|| format!("tensor {name}"))
    }

    /// What tells this checkpoint from others without reading its weights: SHA-256 of config.json and of the
    /// headers of its safetensors files, in hex.
    ///
    /// # Errors
    /// A failed read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(read_file(&self.dir.join("config.json")).context("config.json")?);
        if let Some(add_on) = &self.add_on {
            hash.update(read_file(&add_on.join(ADD_ON_CONFIG)).context(ADD_ON_CONFIG)?);
        }
        for shard in &self.shards {
            let mut header = vec![0; shard.header_len as usize];
            shard
                .file
                .read_exact_at(&mut header, 0)
                .with_context(|| format!("{}: reading the header", shard.path.display()))?;
            hash.update(&header);
        }
        Ok(hexadecimal(hash))
    }

    /// What tells this model's weights from others, however they are divided into files: SHA-256, in hex, of one line for
    /// each tensor in the order of names, `NAME TYPE [SHAPE] SHA256`, where the last is that of the tensor's bytes.
    ///
    /// # Errors
    /// A failed read.
    pub fn content_fingerprint(&self) -> Result<String> {
        let line = |(name, info): (&String, &TensorInfo)| -> Result<String> {
            let mut hash = Sha256::new();
            for start in (0..info.len).step_by(CHUNK_BYTES) {
                hash.update(self.read_range(name, start..info.len.min(start + CHUNK_BYTES))?);
            }
            Ok(format!("{name} {} {:?} {}\n", info.dtype, info.shape, hexadecimal(hash)))
        };
        let tensors: Vec<_> = self.tensors.iter().collect();
        let lines: Vec<String> = tensors.into_par_iter().map(line).collect::<Result<_>>()?;
        let mut hash = Sha256::new();
        lines.iter().for_each(|line| hash.update(line));
        Ok(hexadecimal(hash))
    }

    fn known(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).with_context(|| format!("{}: tensor {name} not found", self.dir.display()))
    }

    /// Checks a tensor's shape and type; its type as candle's.
    fn check(&self, name: &str, shape: &[usize]) -> Result<DType> {
        let info = self.known(name)?;
        let path = self.shards[info.shard].path.display();
        ensure!(
            info.shape == shape,
            "{path}: tensor {name}: expected shape {shape:?} by config.json, found {:?}",
            info.shape
        );
        float_dtype(info.dtype).with_context(|| {
            format!(
                "{path}: tensor {name}: expected type F32, F16 or BF16, found {}: {}",
                info.dtype,
                match info.dtype {
                    Dtype::F64 => "save the model in F32 first",
                    _ => "give the unquantized model",
                }
            )
        })
    }

    pub(super) fn check_tensors(&self) -> Result<()> {
        let expected = expected_tensors(&self.config);
        let missing: Vec<&str> = expected
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|n| !self.tensors.contains_key(*n))
            .collect();
        if let [first, rest @ ..] = missing.as_slice() {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            bail!(
                "{}: tensor {first}{more} missing: config.json asks for it, the safetensors files do not hold it",
                self.dir.display()
            );
        }
        expected.iter().try_for_each(|(name, shape)| self.check(name, shape).map(drop))
    }
}

fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// candle's name of a floating-point type that models are stored in.
pub fn float_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Opens the shards that an index names, and takes all tensors that they hold, as transformers does: where a tensor is,
/// only the shards themselves say. If two shards hold it, the one that the index names for it does.
fn open_sharded(dir: &Path) -> Result<(Vec<Shard>, BTreeMap<String, TensorInfo>)> {
    let path = dir.join(INDEX);
    let text = read_file(&path).with_context(|| path.display().to_string())?;
    let index: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
    let weight_map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .filter(|map| !map.is_empty())
        .with_context(|| format!("{}: expected a \"weight_map\" of tensors to files", path.display()))?;
    let mut files = BTreeSet::new();
    for (name, file) in weight_map {
        let file = file.as_str().filter(|file| is_plain_name(file)).with_context(|| {
            format!(
                "{}: tensor {name} is said to be in {file}: expected the name of a file in the same folder",
                path.display()
            )
        })?;
        files.insert(file);
    }
    let mut shards = Vec::with_capacity(files.len());
    let mut tensors = BTreeMap::new();
    for (position, file) in files.into_iter().enumerate() {
        let (shard, found) = open_shard(&dir.join(file), position)?;
        for (name, info) in found {
            let named = weight_map.get(&name).and_then(serde_json::Value::as_str) == Some(file);
            if named || !tensors.contains_key(&name) {
                tensors.insert(name, info);
            }
        }
        shards.push(shard);
    }
    Ok((shards, tensors))
}

/// The tensors by the names that they have in a whole model. Files that hold the decoder alone leave the prefix
/// `model.` out.
fn with_prefix(tensors: BTreeMap<String, TensorInfo>) -> BTreeMap<String, TensorInfo> {
    const PREFIX: &str = "model.";
    let decoder_alone = EMBEDDING.strip_prefix(PREFIX).is_some_and(|name| tensors.contains_key(name));
    if tensors.contains_key(EMBEDDING) || !decoder_alone {
        return tensors;
    }
    let rename = |name: String| if name == LM_HEAD { name } else { format!("{PREFIX}{name}") };
    tensors.into_iter().map(|(name, info)| (rename(name), info)).collect()
}

/// Whether `name` is one file name: no separator, not `..`, not absolute.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains(['\\', '\0'])
}

/// Opens a safetensors file and reads and checks its header.
pub(super) fn open_shard(path: &Path, shard: usize) -> Result<(Shard, BTreeMap<String, TensorInfo>)> {
    let meta =
        std::fs::metadata(path).with_context(|| format!("{}: file missing or unreadable", path.display()))?;
    ensure!(meta.is_file(), "{}: not a regular file", path.display());
    ensure!(
        meta.len() >= 8,
        "{}: {} bytes are too few for a safetensors file: truncated, fetch it again",
        path.display(),
        meta.len()
    );
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let (header_len, metadata) = read_header(&file, meta.len())
        .with_context(|| format!("{}: broken safetensors file, fetch or export it again", path.display()))?;
    let data = header_len + 8;
    let tensors = infos(&metadata, shard, data);
    Ok((Shard { path: path.to_path_buf(), file: Arc::new(file), header_len: data }, tensors))
}

fn infos(metadata: &Metadata, shard: usize, data: u64) -> BTreeMap<String, TensorInfo> {
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = info.data_offsets;
        let info = TensorInfo {
            dtype: info.dtype,
            shape: info.shape.clone(),
            shard,
            offset: data + start as u64,
            len: end - start,
        };
        (name, info)
    };
    metadata.tensors().into_iter().map(place).collect()
}

/// Length and content of the header of a safetensors file of `file_len` bytes, 8 or more.
fn read_header(file: &File, file_len: u64) -> Result<(u64, Metadata)> {
    let mut len = [0; 8];
    file.read_exact_at(&mut len, 0)?;
    let (len, rest) = (u64::from_le_bytes(len), file_len - 8);
    ensure!(
        len <= rest.min(MAX_HEADER_LEN),
        "the header claims {len} bytes, {rest} follow in the file (and at most {MAX_HEADER_LEN} are allowed): truncated or not safetensors"
    );
    let mut header = vec![0; len as usize];
    file.read_exact_at(&mut header, 8)?;
    // parsing checks every shape and type against its offsets, and that these leave no hole and no overlap
    let metadata: Metadata = serde_json::from_slice(&header).context("the header is not valid")?;
    let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
    let data = rest - len;
    ensure!(end <= data, "the header lists {end} bytes of data, the file holds {data}: truncated");
    ensure!(end == data, "the header lists {end} bytes of data, the file holds {data}: too long");
    Ok((len, metadata))
}

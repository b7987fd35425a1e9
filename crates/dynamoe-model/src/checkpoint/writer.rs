//! Writing safetensors as a stream: the headers first, from names, types and shapes alone, then each tensor's
//! bytes in chunks, in whatever order the caller has them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// The largest shard written by default: 5 GB, as transformers does.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Elements of a candle tensor converted at a time.
const CHUNK_ELEMENTS: usize = 2 << 20;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Distributes tensors over shards of at most `max_shard_bytes` of data (a larger tensor has a shard of its
/// own), in order.
pub fn plan_shards(specs: Vec<TensorSpec>, max_shard_bytes: u64) -> Vec<Vec<TensorSpec>> {
    let mut shards: Vec<Vec<TensorSpec>> = Vec::new();
    let mut used = 0;
    for spec in specs {
        let len = spec.len();
        match shards.last_mut() {
            Some(shard) if used + len <= max_shard_bytes => {
                used += len;
                shard.push(spec);
            }
            _ => {
                used = len;
                shards.push(vec![spec]);
            }
        }
    }
    shards
}

/// Where the next bytes of a tensor go.
struct Slot {
    shard: usize,
    next: u64,
    end: u64,
}

/// The safetensors files of a folder, being written: model.safetensors, or several shards and their index.
pub struct Writer {
    files: Vec<(PathBuf, File)>,
    slots: BTreeMap<String, Slot>,
}

impl Writer {
    /// Creates the files with their headers (and the index, for more than one) in `dir`.
    ///
    /// # Errors
    /// A name that comes twice, or a file that cannot be written.
    pub fn create(dir: &Path, shards: Vec<Vec<TensorSpec>>) -> Result<Self> {
        let count = shards.len();
        let mut writer = Self { files: Vec::with_capacity(count), slots: BTreeMap::new() };
        let mut weight_map = BTreeMap::new();
        let mut total = 0;
        for (number, specs) in shards.into_iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            for spec in &specs {
                total += spec.len();
                weight_map.insert(spec.name.clone(), Value::from(file.clone()));
            }
            writer.add_shard(dir.join(file), specs)?;
        }
        if count > 1 {
            let index = json!({
                "metadata": { "total_size": total },
                "weight_map": Value::Object(weight_map.into_iter().collect::<Map<_, _>>()),
            });
            let path = dir.join("model.safetensors.index.json");
            let text = serde_json::to_vec_pretty(&index)?;
            std::fs::write(&path, text).with_context(|| format!("{}: writing", path.display()))?;
        }
        Ok(writer)
    }

    /// Creates one file with its header.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn create_file(path: PathBuf, specs: Vec<TensorSpec>) -> Result<Self> {
        let mut writer = Self { files: Vec::new(), slots: BTreeMap::new() };
        writer.add_shard(path, specs)?;
        Ok(writer)
    }

    fn add_shard(&mut self, path: PathBuf, mut specs: Vec<TensorSpec>) -> Result<()> {
        // wide types first, so that every tensor is aligned to its type
        specs.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut offset = 0;
        for spec in &specs {
            let end = offset + spec.len();
            let entry = json!({ "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end] });
            header.insert(spec.name.clone(), entry);
            offset = end;
        }
        let mut text = serde_json::to_vec(&Value::Object(header))?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let data = 8 + text.len() as u64;
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        let write = || -> std::io::Result<File> {
            let file = File::create(&path)?;
            file.write_all_at(&bytes, 0)?;
            Ok(file)
        };
        let file = write().with_context(|| format!("{}: writing", path.display()))?;
        let shard = self.files.len();
        let mut next = data;
        for spec in &specs {
            let slot = Slot { shard, next, end: next + spec.len() };
            next = slot.end;
            ensure!(self.slots.insert(spec.name.clone(), slot).is_none(), "tensor {} comes twice", spec.name);
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Appends bytes (little endian, rows first) to a tensor.
    ///
    /// # Errors
    /// An unknown name, more bytes than the tensor has, a failed write.
    pub fn push(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self.slots.get_mut(name).with_context(|| format!("tensor {name} was not announced"))?;
        let left = slot.end - slot.next;
        ensure!(bytes.len() as u64 <= left, "tensor {name}: {} bytes given, {left} expected", bytes.len());
        let (path, file) = &self.files[slot.shard];
        file.write_all_at(bytes, slot.next).with_context(|| format!("{}: writing", path.display()))?;
        slot.next += bytes.len() as u64;
        Ok(())
    }

    /// Appends a whole candle tensor, converted to `dtype` (F32, F16 or BF16), chunk by chunk.
    ///
    /// # Errors
    /// As [`Writer::push`]; another `dtype`; a value that is not finite.
    pub fn push_tensor(&mut self, name: &str, tensor: &Tensor, dtype: Dtype) -> Result<()> {
        let flat = tensor.flatten_all()?;
        let len = flat.elem_count();
        for start in (0..len).step_by(CHUNK_ELEMENTS) {
            let chunk = flat.narrow(0, start, CHUNK_ELEMENTS.min(len - start))?;
            let bytes = to_bytes(&chunk, dtype).with_context(|| format!("tensor {name}"))?;
            check_finite(name, &bytes, dtype, tensor.dims(), start)?;
            self.push(name, &bytes)?;
        }
        Ok(())
    }

    /// Checks that every tensor is complete.
    ///
    /// # Errors
    /// The first that is not.
    pub fn finish(self) -> Result<()> {
        match self.slots.iter().find(|(_, slot)| slot.next != slot.end) {
            Some((name, slot)) => bail!("tensor {name}: {} bytes were not written", slot.end - slot.next),
            None => Ok(()),
        }
    }
}

/// Writes candle tensors to `dir` in the types that `dtype` gives their names (F32, F16 or BF16).
///
/// # Errors
/// As [`Writer`]'s.
pub fn save_tensors(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    dtype: impl Fn(&str) -> Dtype,
    max_shard_bytes: u64,
) -> Result<()> {
    let spec = |(name, tensor): (&String, &Tensor)| TensorSpec {
        name: name.clone(),
        dtype: dtype(name),
        shape: tensor.dims().to_vec(),
    };
    let mut writer = Writer::create(dir, plan_shards(tensors.iter().map(spec).collect(), max_shard_bytes))?;
    for (name, tensor) in tensors {
        writer.push_tensor(name, tensor, dtype(name))?;
    }
    writer.finish()
}

/// Little-endian bytes of a flat tensor in a floating-point type.
pub fn to_bytes(flat: &Tensor, dtype: Dtype) -> Result<Vec<u8>> {
    Ok(match dtype {
        Dtype::F32 => {
            flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect()
        }
        Dtype::F16 => {
            flat.to_dtype(DType::F16)?.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect()
        }
        Dtype::BF16 => {
            flat.to_dtype(DType::BF16)?.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect()
        }
        other => bail!("weights are written as F32, F16 or BF16, not {other}"),
    })
}

/// Checks that no value of a chunk is NaN or infinite; types other than F32, F16 and BF16 pass. `start` is the
/// chunk's first element in the tensor.
pub fn check_finite(name: &str, bytes: &[u8], dtype: Dtype, shape: &[usize], start: usize) -> Result<()> {
    // not finite: all bits of the exponent are set
    let (halves, words) = (bytes.as_chunks::<2>().0, bytes.as_chunks::<4>().0);
    let bad = match dtype {
        Dtype::F32 => first(words, |b| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first(halves, |b| u16::from_le_bytes(*b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => first(halves, |b| u16::from_le_bytes(*b) & 0x7f80 == 0x7f80),
        _ => None,
    };
    let Some(position) = bad else { return Ok(()) };
    let mut flat = start + position;
    let mut index = vec![0; shape.len()];
    for (at, &size) in index.iter_mut().zip(shape).rev() {
        *at = flat % size;
        flat /= size;
    }
    bail!(
        "tensor {name}: the value at index {index:?} is NaN or infinite in {dtype}: the model is broken, or needs a wider type"
    )
}

/// Position of the first element that is bad. Nearly always there is none, and a loop without an early exit,
/// which the compiler turns into vector code, finds that out first.
fn first<T>(elements: &[T], bad: impl Fn(&T) -> bool) -> Option<usize> {
    let any = elements.iter().fold(false, |any, element| any | bad(element));
    if any { elements.iter().position(bad) } else { None }
}

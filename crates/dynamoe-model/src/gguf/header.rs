//! The header of a GGUF file: what it says of the model, and where its tensors lie.
//!
//! The file is trusted with nothing: no allocation is larger than what is left of it, and every tensor lies within it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use sha2::{Digest, Sha256};

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Where data begins after the header, and each tensor within the data, unless the file says otherwise.
const ALIGNMENT: u64 = 32;
/// The longest header that is read: the largest vocabularies take a tenth of it.
const MAX_HEADER: u64 = 128 << 20;
const MAX_DIMENSIONS: u32 = 4;

/// GGUF's numbers of the types that are read.
const KINDS: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (30, GgmlDType::BF16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
];

/// The type with this number.
fn kind_of(number: u32) -> Result<GgmlDType> {
    KINDS.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind).with_context(|| {
        let known: Vec<String> = KINDS.iter().map(|(_, kind)| format!("{kind:?}")).collect();
        format!(
            "type number {number} is not supported; supported: {}; give a file of such types",
            known.join(", ")
        )
    })
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Whole(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    List(Vec<Value>),
}

/// A tensor, as the file describes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Info {
    pub kind: GgmlDType,
    /// Rows first, as Hugging Face has it.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
}

impl Info {
    /// Length in bytes.
    pub fn len(&self) -> Option<u64> {
        let numbers = self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64))?;
        (numbers / self.kind.block_size() as u64).checked_mul(self.kind.type_size() as u64)
    }
}

/// An open GGUF file.
pub(super) struct Gguf {
    pub path: PathBuf,
    pub file: File,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Info>,
    /// SHA-256 of the header and of the file's length.
    pub digest: Sha256,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// A file that is none of GGUF's, is cut off, or is one of several parts.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        ensure!(meta.is_file(), "{}: expected a regular file", path.display());
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let mut reader =
            Reader { file: BufReader::new(&file), len: meta.len(), at: 0, digest: Sha256::new() };
        let (metadata, mut tensors) = reader.header().with_context(|| path.display().to_string())?;
        if let Some(Value::Whole(parts @ 2..)) = metadata.get("split.count") {
            bail!(
                "{}: one of {parts} files of a model: put them together (llama-gguf-split --merge FIRST OUT) and give the \
                 result",
                path.display()
            );
        }
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Whole(given @ 1..)) => *given as u64,
            _ => ALIGNMENT,
        };
        let data = reader.at.next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let end = info.start.checked_add(data).and_then(|start| start.checked_add(info.len()?));
            ensure!(
                end.is_some_and(|end| end <= meta.len()),
                "{}: tensor {name} ends beyond the file's {} bytes: it is cut off, fetch it again",
                path.display(),
                meta.len()
            );
            info.start += data;
        }
        let digest = reader.digest.chain_update(meta.len().to_le_bytes());
        Ok(Self { path: path.to_path_buf(), file, metadata, tensors, digest })
    }

    /// A value, parsed.
    fn parse<T>(&self, key: &str, expected: &str, parse: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(found) = self.metadata.get(key) else { return Ok(None) };
        parse(found).map(Some).with_context(|| {
            let mut text = format!("{found:?}");
            text.truncate(text.char_indices().nth(60).map_or(text.len(), |(at, _)| at));
            format!("{}: {key}: expected {expected}, found {text}", self.path.display())
        })
    }

    pub fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.parse(key, "a whole number, 0 or more", |value| match value {
            Value::Whole(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.parse(key, "a number", |value| match value {
            Value::Whole(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            _ => None,
        })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.parse(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Ok(Some(text)),
            _ => self.parse(key, "a text", |_| None),
        }
    }

    /// A list whose every value `parse` takes.
    pub fn list<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        parse: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let list = match self.metadata.get(key) {
            Some(Value::List(list)) => list.iter().map(parse).collect::<Option<Vec<T>>>(),
            _ => None,
        };
        if list.is_some() { Ok(list) } else { self.parse(key, expected, |_| None) }
    }
}

/// Reads numbers and texts, and keeps count of the bytes.
struct Reader<'a> {
    file: BufReader<&'a File>,
    len: u64,
    at: u64,
    digest: Sha256,
}

impl Reader<'_> {
    fn header(&mut self) -> Result<(BTreeMap<String, Value>, BTreeMap<String, Info>)> {
        ensure!(&self.array::<4>()? == MAGIC, "not a GGUF file: it does not begin with \"GGUF\"");
        let version = self.u32()?;
        ensure!(
            (2..=3).contains(&version),
            "GGUF version 2 or 3 expected, little endian, found {version}: make the file again with a newer llama.cpp"
        );
        let (tensors, pairs) = (self.u64()?, self.u64()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind).with_context(|| format!("metadata {key:?}"))?;
            metadata.insert(key, value);
        }
        let mut infos = BTreeMap::new();
        for _ in 0..tensors {
            let name = self.text()?;
            let info = self.info().with_context(|| format!("tensor {name}"))?;
            infos.insert(name, info);
        }
        Ok((metadata, infos))
    }

    fn info(&mut self) -> Result<Info> {
        let count = self.u32()?;
        ensure!(
            (1..=MAX_DIMENSIONS).contains(&count),
            "expected 1 to {MAX_DIMENSIONS} dimensions, found {count}"
        );
        let mut shape = Vec::new();
        for _ in 0..count {
            shape.push(usize::try_from(self.u64()?)?);
        }
        let kind = kind_of(self.u32()?)?;
        ensure!(
            shape[0].is_multiple_of(kind.block_size()),
            "{kind:?} has blocks of {} numbers, and rows are {} long: the file is broken",
            kind.block_size(),
            shape[0]
        );
        shape.reverse();
        Ok(Info { kind, shape, start: self.u64()? })
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        const LIST: u32 = 9;
        if kind != LIST {
            return self.scalar(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        ensure!(kind != LIST, "a list of lists is not supported");
        // every value takes a byte or more
        ensure!(
            count <= self.len - self.at,
            "a list of {count} values goes beyond the end: the file is cut off"
        );
        (0..count).map(|_| self.scalar(kind)).collect::<Result<_>>().map(Value::List)
    }

    fn scalar(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Whole(i64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Whole(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Whole(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Whole(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Whole(i64::from(self.u32()?)),
            5 => Value::Whole(i64::from(i32::from_le_bytes(self.array()?))),
            // the shortest decimal that means the same 32 bits, which is what a person wrote
            6 => Value::Float(f32::from_le_bytes(self.array()?).to_string().parse()?),
            7 => Value::Flag(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            10 => Value::Whole(i64::try_from(self.u64()?)?),
            11 => Value::Whole(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => bail!("a value of the unknown type {other}: the file is broken"),
        })
    }

    fn text(&mut self) -> Result<String> {
        let len = self.u64()?;
        ensure!(len <= self.len - self.at, "a text of {len} bytes goes beyond the end: the file is cut off");
        let mut bytes = vec![0; self.within(len)? as usize];
        self.fill(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let len = self.within(bytes.len() as u64)?;
        self.file
            .read_exact(bytes)
            .context("the header goes beyond the end: the file is cut off, fetch it again")?;
        self.digest.update(&*bytes);
        self.at += len;
        Ok(())
    }

    /// `len`, if that many bytes more do not make the header too long.
    fn within(&self, len: u64) -> Result<u64> {
        ensure!(self.at + len <= MAX_HEADER, "expected a header of at most {MAX_HEADER} bytes, found more");
        Ok(len)
    }
}

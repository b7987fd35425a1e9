//! Documents from text files: `.txt` split on a marker, `.jsonl` with the text in one field.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};
use serde_json::Value;

/// A text file and how often its text is drawn, as given by `--data PATH[:WEIGHT]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSource {
    /// A `.txt` or `.jsonl` file.
    pub path: PathBuf,
    /// How many times each part of the file is seen per epoch: 1 is once, 0.5 every second epoch.
    pub weight: f64,
}

impl FromStr for DataSource {
    type Err = Error;

    /// Parses `PATH[:WEIGHT]`; a file whose whole name contains a colon is taken as it is.
    fn from_str(argument: &str) -> Result<Self> {
        ensure!(!argument.is_empty(), "expected PATH[:WEIGHT], found nothing");
        let whole = Self { path: argument.into(), weight: 1.0 };
        if whole.path.exists() {
            return Ok(whole);
        }
        let Some((path, weight)) = argument.rsplit_once(':') else { return Ok(whole) };
        let weight: f64 = weight.parse().with_context(|| {
            format!("{argument}: no such file, and the weight {weight:?} is not a number")
        })?;
        ensure!(
            weight.is_finite() && weight > 0.0,
            "{argument}: the weight must be positive, found {weight}"
        );
        ensure!(!path.is_empty(), "{argument}: expected PATH[:WEIGHT], found no path");
        Ok(Self { path: path.into(), weight })
    }
}

/// What stands between two documents of a .txt file unless another is named.
pub const DOCUMENT_MARKER: &str = "<|endoftext|>";
/// The field of a .jsonl file's lines that holds the text unless another is named.
pub const TEXT_FIELD: &str = "text";

/// How documents are found inside a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFormat {
    /// `.txt`: what stands between two documents.
    pub marker: String,
    /// `.jsonl`: the field that holds the text.
    pub field: String,
}

impl Default for TextFormat {
    fn default() -> Self {
        Self { marker: DOCUMENT_MARKER.into(), field: TEXT_FIELD.into() }
    }
}

/// The documents of a file in order, each trimmed of white space at both ends; empty ones are left out. A byte-order mark
/// is skipped, and the lines of a `.txt` file may end as on Windows.
pub struct Documents {
    inner: Box<dyn Iterator<Item = Result<String>>>,
}

impl Documents {
    /// Opens a `.txt` or `.jsonl` file; it is read as the iterator advances.
    ///
    /// # Errors
    /// A missing or empty file, another extension, an empty marker. While iterating: invalid UTF-8 (with its byte
    /// offset), a line that is no JSON object or lacks the field (with its number).
    pub fn open(path: &Path, format: &TextFormat) -> Result<Self> {
        let inner: Box<dyn Iterator<Item = Result<String>>> =
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("txt") => Box::new(split_on_marker(path, &format.marker)?),
                Some("jsonl") => Box::new(json_field(path, &format.field)?),
                _ => bail!("{}: expected a .txt or a .jsonl file", path.display()),
            };
        Ok(Self { inner })
    }
}

impl Iterator for Documents {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.inner.next()? {
                Ok(document) if document.trim().is_empty() => {}
                Ok(document) => return Some(Ok(document.trim().to_owned())),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

fn split_on_marker(path: &Path, marker: &str) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    ensure!(!marker.is_empty(), "the marker between documents must not be empty");
    let mut pieces = Pieces::open(path, marker)?;
    // Windows ends lines with two characters; models know one
    let lines = |text: String| if text.contains('\r') { text.replace("\r\n", "\n") } else { text };
    Ok(std::iter::from_fn(move || Some(pieces.next_piece().transpose()?.map(lines))))
}

fn json_field(path: &Path, field: &str) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    let (path, field) = (path.to_owned(), field.to_owned());
    let lines = JsonLines::open(&path)?;
    Ok(lines.map(move |line| {
        let (number, object) = line?;
        string_field(&object, &field).with_context(|| format!("{}: line {number}", path.display()))
    }))
}

/// The text under `field` of a JSON object.
pub(crate) fn string_field(object: &Value, field: &str) -> Result<String> {
    match object.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => bail!("the field {field:?} is not a string"),
        None => bail!("expected a JSON object with the field {field:?}"),
    }
}

/// The non-blank lines of a `.jsonl` file, parsed, each with its number from 1.
pub(crate) struct JsonLines {
    lines: Pieces,
    number: usize,
}

impl JsonLines {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Ok(Self { lines: Pieces::open(path, "\n")?, number: 0 })
    }

    fn next_line(&mut self) -> Result<Option<(usize, Value)>> {
        while let Some(line) = self.lines.next_piece()? {
            self.number += 1;
            if line.trim().is_empty() {
                continue;
            }
            let value = serde_json::from_str(&line).with_context(|| {
                format!("{}: line {} is not JSON", self.lines.path.display(), self.number)
            })?;
            return Ok(Some((self.number, value)));
        }
        Ok(None)
    }
}

impl Iterator for JsonLines {
    type Item = Result<(usize, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_line().transpose()
    }
}

/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// What stands between the occurrences of a separator; only one piece is in memory at a time.
struct Pieces {
    path: PathBuf,
    reader: BufReader<File>,
    separator: Vec<u8>,
    /// Bytes consumed by the pieces so far.
    offset: usize,
}

impl Pieces {
    fn open(path: &Path, separator: &str) -> Result<Self> {
        let mut reader = BufReader::with_capacity(1 << 20, open_text(path)?);
        // the mark that some editors put in front of UTF-8 is no text
        let start = reader.fill_buf().with_context(|| format!("{}: cannot be read", path.display()))?;
        let offset = if start.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        reader.consume(offset);
        Ok(Self { path: path.to_owned(), reader, separator: separator.as_bytes().to_vec(), offset })
    }

    fn next_piece(&mut self) -> Result<Option<String>> {
        let Some(&last_byte) = self.separator.last() else { bail!("the separator must not be empty") };
        let mut bytes = Vec::new();
        loop {
            let read = self.reader.read_until(last_byte, &mut bytes);
            let read = read.with_context(|| format!("{}: cannot be read", self.path.display()))?;
            if read == 0 || bytes.ends_with(&self.separator) {
                break;
            }
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        let start = self.offset;
        self.offset += bytes.len();
        if bytes.ends_with(&self.separator) {
            bytes.truncate(bytes.len() - self.separator.len());
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let byte = start + error.utf8_error().valid_up_to();
            Error::msg(format!("{}: invalid UTF-8 at byte {byte}: expected UTF-8 text", self.path.display()))
        })?;
        Ok(Some(text))
    }
}

/// Opens a regular file that is not empty.
pub(crate) fn open_text(path: &Path) -> Result<File> {
    let file = File::open(path).with_context(|| format!("{}: cannot be opened", path.display()))?;
    let metadata = file.metadata().with_context(|| format!("{}: cannot be read", path.display()))?;
    ensure!(metadata.is_file(), "{}: expected a file", path.display());
    ensure!(metadata.len() > 0, "{}: the file is empty: expected text", path.display());
    Ok(file)
}

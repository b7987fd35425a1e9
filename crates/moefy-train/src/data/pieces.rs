//! Pieces of a text file, plain or compressed, one in memory at a time.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Error, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;
use serde_json::Value;

use super::kind::Packing;

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// How many bytes of a file have been read.
pub(crate) type Position = Rc<Cell<u64>>;

/// The non-blank lines of a `.jsonl` file, parsed, each with its number from 1.
pub(crate) struct JsonLines {
    lines: Pieces,
    number: usize,
}

impl JsonLines {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::open_at(path, &Position::default())
    }

    /// Opens a file whose position `position` shows.
    pub(crate) fn open_at(path: &Path, position: &Position) -> Result<Self> {
        Ok(Self { lines: Pieces::open(path, "\n", position)?, number: 0 })
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

/// What stands between the occurrences of a separator; only one piece is in memory at a time.
pub(super) struct Pieces {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    separator: Vec<u8>,
    /// Bytes of text consumed by the pieces so far.
    offset: usize,
}

impl Pieces {
    pub(super) fn open(path: &Path, separator: &str, position: &Position) -> Result<Self> {
        let mut reader = unpacked(path, position)?;
        let start = reader.fill_buf().with_context(|| unreadable(path))?;
        // the mark that some editors put in front of UTF-8 is no text
        let offset = if start.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        // a file without separators would be read whole before its text is looked at
        check_text(path, &start[offset..], offset)?;
        reader.consume(offset);
        Ok(Self { path: path.to_owned(), reader, separator: separator.as_bytes().to_vec(), offset })
    }

    pub(super) fn next_piece(&mut self) -> Result<Option<String>> {
        let Some(&last_byte) = self.separator.last() else { bail!("the separator must not be empty") };
        let mut bytes = Vec::new();
        loop {
            let read = self.reader.read_until(last_byte, &mut bytes);
            let read = read.with_context(|| unreadable(&self.path))?;
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
        if bytes.contains(&0) {
            check_text(&self.path, &bytes, start)?;
        }
        let text = String::from_utf8(bytes)
            .map_err(|error| invalid(&self.path, start + error.utf8_error().valid_up_to()))?;
        Ok(Some(text))
    }
}

/// Refuses what is no text for certain; a character may be cut at the end.
fn check_text(path: &Path, bytes: &[u8], offset: usize) -> Result<()> {
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        bail!(
            "{}: byte {} is 0: expected UTF-8 text, found a binary file or text in UTF-16",
            path.display(),
            offset + at
        );
    }
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_some() => Err(invalid(path, offset + error.valid_up_to())),
        _ => Ok(()),
    }
}

fn invalid(path: &Path, byte: usize) -> Error {
    Error::msg(format!("{}: invalid UTF-8 at byte {byte}: expected UTF-8 text", path.display()))
}

/// What to say where a read fails: most often a compressed file is cut off.
fn unreadable(path: &Path) -> String {
    match Packing::of(path) {
        Packing::Plain => format!("{}: cannot be read", path.display()),
        packing => format!(
            "{}: cannot be read to its end: truncated, damaged or no {} file",
            path.display(),
            packing.ending()
        ),
    }
}

/// The bytes of a text file, without its compression.
fn unpacked(path: &Path, position: &Position) -> Result<Box<dyn BufRead>> {
    let file = Counted { file: open_text(path)?, position: Rc::clone(position) };
    let mut file = BufReader::with_capacity(BUFFER, file);
    let start = file.fill_buf().with_context(|| unreadable(path))?;
    let (packing, found) = (Packing::of(path), Packing::found(start));
    ensure!(
        found == packing || found == Packing::Plain,
        "{}: the file is compressed: its name has to end in {}",
        path.display(),
        found.ending()
    );
    let unpacked: Box<dyn Read> = match packing {
        Packing::Plain => return Ok(Box::new(file)),
        Packing::Gzip => Box::new(MultiGzDecoder::new(file)),
        Packing::Zstandard => Box::new(zstd::Decoder::with_buffer(file).with_context(|| unreadable(path))?),
    };
    Ok(Box::new(BufReader::with_capacity(BUFFER, unpacked)))
}

/// A file that counts what is read of it.
struct Counted {
    file: File,
    position: Position,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.position.set(self.position.get() + read as u64);
        Ok(read)
    }
}

/// Opens a regular file that is not empty.
pub(crate) fn open_text(path: &Path) -> Result<File> {
    let cannot = || format!("{}: cannot be opened", path.display());
    // looked at before it is opened: opening a pipe waits for a writer
    let metadata = std::fs::metadata(path).with_context(cannot)?;
    ensure!(metadata.is_file(), "{}: expected a file", path.display());
    ensure!(metadata.len() > 0, "{}: the file is empty: expected text", path.display());
    File::open(path).with_context(cannot)
}

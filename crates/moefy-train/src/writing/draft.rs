//! The file in the making: whole groups of documents, one record a line, under another name until it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::documents::Record;
use anyhow::{Context, Result};

/// A text that is being written.
pub(super) struct Draft<C> {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    /// Of whole groups.
    documents: u64,
    tokens: u64,
    /// Tokens of a record.
    count: C,
}

/// A whole line of an earlier draft.
struct Line {
    /// Where it begins in the file.
    start: u64,
    document: u64,
    tokens: u64,
}

impl<C: Fn(&Record) -> Result<usize>> Draft<C> {
    /// Goes on with the draft of the file at `path`, or begins one. `group` is the number of documents in the group that
    /// comes after so many tokens. The last group counts only if a later one was begun: what else there is of it is
    /// dropped.
    pub fn open(path: &Path, group: impl Fn(u64) -> usize, count: C) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let cannot = || format!("{}: cannot be written", partial.display());
        let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
        let mut file = open.with_context(cannot)?;
        let lines = lines(&fs::read(&partial).with_context(cannot)?, &count)?;
        let (mut documents, mut tokens) = (0, 0);
        loop {
            let end = documents + group(tokens) as u64;
            if lines.iter().all(|line| line.document < end) {
                break;
            }
            let of_group = lines.iter().filter(|line| (documents..end).contains(&line.document));
            tokens += of_group.map(|line| line.tokens).sum::<u64>();
            documents = end;
        }
        let kept = lines.iter().find(|line| line.document >= documents).map_or(0, |line| line.start);
        file.set_len(kept).with_context(cannot)?;
        file.seek(SeekFrom::Start(kept)).with_context(cannot)?;
        Ok(Self { path: path.to_owned(), partial, file, documents, tokens, count })
    }

    /// Documents so far, those included of which nothing could be used.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds the next group, `records` of so many documents, or what is needed of it to have `wanted` tokens.
    pub fn append(&mut self, records: &[Record], documents: usize, wanted: u64) -> Result<()> {
        let mut lines = String::new();
        for record in records {
            if self.tokens >= wanted {
                break;
            }
            self.tokens += (self.count)(record)? as u64;
            lines += &serde_json::to_string(record)?;
            lines.push('\n');
        }
        self.documents += documents as u64;
        let written = self.file.write_all(lines.as_bytes()).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("{}: cannot be written", self.partial.display()))
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        fs::rename(&self.partial, &self.path)
            .and_then(|()| File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all())
            .with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

/// The lines of a draft up to the first one that is torn.
fn lines(bytes: &[u8], count: &impl Fn(&Record) -> Result<usize>) -> Result<Vec<Line>> {
    let (mut lines, mut start) = (Vec::new(), 0);
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let record = line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice::<Record>(line).ok());
        let Some(record) = record else { break };
        lines.push(Line { start, document: record.document, tokens: count(&record)? as u64 });
        start += line.len() as u64;
    }
    Ok(lines)
}

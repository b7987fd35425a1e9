//! Documents from text files: `.txt` split on a marker, records of `.jsonl` and `.parquet`, compressed or not.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};
use dynamoe_model::hub::{DataSet, is_address};
use glob::{MatchOptions, glob_with};
use serde_json::Value;

use super::format::TextFormat;
use super::hub;
use super::kind::{Content, ENDINGS};
use super::own::OwnText;
use super::pieces::{JsonLines, Pieces, Position};
use super::records::{self, Document};
use super::rows::Rows;

/// Text and how often it is drawn, as given by `--data PATH[:WEIGHT]` or `--data self[:TOKENS]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSource {
    /// A file, a folder of files, a pattern for the names of files, or the address of a data set on the hub. Of text that the
    /// model writes itself: where it is, once it is written.
    pub path: PathBuf,
    /// How many times each part of the text is seen per epoch: 1 is once, 0.5 every second epoch.
    pub weight: f64,
    /// For a data set on the hub: the commit that its files were fetched from.
    pub commit: Option<String>,
    /// For text that the model writes itself: what was asked for.
    pub own: Option<OwnText>,
}

impl DataSource {
    /// A file, a folder of files or a pattern for the names of files, each part of it once per epoch.
    pub fn local(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), weight: 1.0, commit: None, own: None }
    }

    /// Its name for messages and reports: a data set on the hub with its commit.
    pub fn name(&self) -> String {
        match (hub::address(&self.path), &self.commit) {
            (Some(Ok(set)), Some(commit)) => DataSet { revision: commit.clone(), ..set }.to_string(),
            _ if self.own.is_some() => format!("{} (written by the model itself)", self.path.display()),
            _ => self.path.display().to_string(),
        }
    }

    /// The text among `sources` that the model is to write itself, if there is one.
    ///
    /// # Errors
    /// Two of them.
    pub fn own_among(sources: &[Self]) -> Result<Option<OwnText>> {
        let mut found = sources.iter().filter_map(|source| source.own);
        let first = found.next();
        ensure!(found.next().is_none(), "--data {}: given twice; the model writes one text", OwnText::NAME);
        Ok(first)
    }

    /// Parses `PATH[:WEIGHT]` where no model is there to write text itself.
    ///
    /// # Errors
    /// Those of parsing; text that the model is to write itself.
    pub fn of_files(argument: &str) -> Result<Self> {
        let source: Self = argument.parse()?;
        ensure!(
            source.own.is_none(),
            "only `run`, `compare` and `finetune` let the model write text, as --data to train on: give a file here (one of \
             this name is ./{argument})"
        );
        Ok(source)
    }

    /// Fetches the files of a data set on the hub; files here need nothing. A run that goes on reads the commit that it
    /// began with: `earlier` are its settings, as [`crate::pipeline::Lab::settings`] made them.
    ///
    /// # Errors
    /// Not an address of a data set, and those of [`DataSet::fetch`].
    pub fn fetch(&mut self, earlier: &[Value]) -> Result<()> {
        let Some(set) = hub::address(&self.path) else { return Ok(()) };
        let mut set = set?;
        if let Some(commit) = hub::commit_in(earlier, &self.path) {
            set.revision = commit;
        }
        self.commit = Some(set.fetch(&hub::wanted(&set)?)?);
        Ok(())
    }

    /// Its files, in the order of their names, without hidden ones. A folder's are those in it that end as text files do.
    ///
    /// # Errors
    /// A folder or a pattern without such files, a pattern that is none, a folder that cannot be read; a data set that was
    /// not fetched.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        if let Some(set) = hub::address(&self.path) {
            let set = set?;
            let commit = self.commit.as_ref().with_context(|| format!("{set}: was not fetched yet"))?;
            return set.fetched(commit, &hub::wanted(&set)?);
        }
        if self.own.is_some() {
            ensure!(self.path.is_file(), "{}: the model's own text was not written yet", self.path.display());
            return Ok(vec![self.path.clone()]);
        }
        let (path, place) = (&self.path, self.path.display());
        let pattern = path.to_str().filter(|name| name.contains(['*', '?', '[']));
        let mut files: Vec<PathBuf> = if path.is_dir() {
            let entries = std::fs::read_dir(path).with_context(|| format!("{place}: cannot be read"))?;
            let entries: Vec<PathBuf> = entries
                .map(|entry| Ok(entry?.path()))
                .collect::<Result<_>>()
                .with_context(|| format!("{place}"))?;
            let hidden =
                |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            entries.into_iter().filter(|path| Content::of(path).is_some() && !hidden(path)).collect()
        } else if let Some(pattern) = pattern.filter(|_| !path.exists()) {
            let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
            let found = glob_with(pattern, options);
            let found = found.with_context(|| format!("{place}: not a pattern for files"))?;
            found.collect::<Result<_, _>>().with_context(|| format!("{place}"))?
        } else {
            return Ok(vec![path.clone()]);
        };
        files.retain(|path| path.is_file());
        ensure!(!files.is_empty(), "{place}: no files there that end in {ENDINGS}");
        files.sort();
        Ok(files)
    }

    /// Bytes of its files together.
    ///
    /// # Errors
    /// Those of [`DataSource::files`]; a file that is not there.
    pub fn bytes(&self) -> Result<u64> {
        let length =
            |path: &PathBuf| Ok(std::fs::metadata(path).with_context(|| path.display().to_string())?.len());
        self.files()?.iter().map(length).sum()
    }
}

impl FromStr for DataSource {
    type Err = Error;

    /// Parses `PATH[:WEIGHT]`, or what [`OwnText`] takes; a file whose whole name contains a colon is taken as it is.
    fn from_str(argument: &str) -> Result<Self> {
        ensure!(!argument.is_empty(), "expected PATH[:WEIGHT], found nothing");
        if let Some(own) = OwnText::asked(argument) {
            return Ok(Self { own: Some(own?), ..Self::local(OwnText::NAME) });
        }
        let whole = Self::local(argument);
        if whole.path.exists() {
            return Ok(whole);
        }
        let Some((path, weight)) = argument.rsplit_once(':') else { return Ok(whole) };
        // the colon of an address
        if is_address(argument) && weight.starts_with("//") {
            return Ok(whole);
        }
        let weight: f64 = weight.parse().with_context(|| {
            format!("{argument}: no such file, and the weight {weight:?} is not a number")
        })?;
        ensure!(
            weight.is_finite() && weight > 0.0,
            "{argument}: the weight must be positive, found {weight}"
        );
        ensure!(!path.is_empty(), "{argument}: expected PATH[:WEIGHT], found no path");
        Ok(Self { weight, ..Self::local(path) })
    }
}

/// The documents of a file in order, each trimmed of white space at both ends; empty ones are left out. A byte-order mark
/// is skipped, and the lines of a `.txt` file may end as on Windows.
pub struct Documents {
    inner: Box<dyn Iterator<Item = Result<Document>>>,
    position: Position,
}

impl Documents {
    /// Opens a file; it is read as the iterator advances.
    ///
    /// # Errors
    /// A missing or empty file, another ending, an empty marker, a Parquet file without the column, text without parts where
    /// prompts are to be masked. While iterating: what
    /// is not UTF-8 (with its byte offset), a line that is no JSON object or lacks the field (with its number), a
    /// compressed file that is cut off.
    pub fn open(path: &Path, format: &TextFormat) -> Result<Self> {
        let position = Position::default();
        let content = Content::of(path)
            .with_context(|| format!("{}: expected a name that ends in {ENDINGS}", path.display()))?;
        ensure!(
            !format.mask_prompt || (content != Content::Text && format.field.is_none()),
            "{}: plain text has no prompt to mask: --mask-prompt needs records with {}",
            path.display(),
            records::expected(format)
        );
        let inner: Box<dyn Iterator<Item = Result<Document>>> = match content {
            Content::Text => {
                let texts = split_on_marker(path, &format.marker, &position)?;
                Box::new(texts.map(|text| text.map(Document::whole)))
            }
            Content::Lines => Box::new(documents(path, "line", JsonLines::open_at(path, &position)?, format)),
            Content::Rows => {
                let rows = Rows::open(path, format, &position)?;
                Box::new(documents(path, "row", rows, format))
            }
        };
        Ok(Self { inner, position })
    }

    /// How many bytes of the file have been read.
    pub fn position(&self) -> u64 {
        self.position.get()
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let document = self.inner.next()?.map(Document::trimmed).transpose();
            if document.is_some() {
                return document;
            }
        }
    }
}

fn split_on_marker(
    path: &Path,
    marker: &str,
    position: &Position,
) -> Result<impl Iterator<Item = Result<String>> + use<>> {
    ensure!(!marker.is_empty(), "the marker between documents must not be empty");
    let mut pieces = Pieces::open(path, marker, position)?;
    // Windows ends lines with two characters; models know one
    let lines = |text: String| if text.contains('\r') { text.replace("\r\n", "\n") } else { text };
    Ok(std::iter::from_fn(move || Some(pieces.next_piece().transpose()?.map(lines))))
}

/// The documents of records that are numbered as a `place` of the file.
fn documents<R: Iterator<Item = Result<(usize, Value)>>>(
    path: &Path,
    place: &'static str,
    records: R,
    format: &TextFormat,
) -> impl Iterator<Item = Result<Document>> + use<R> {
    let (path, format) = (path.to_owned(), format.clone());
    records.map(move |record| {
        let (number, record) = record?;
        records::document(&record, &format).with_context(|| format!("{}: {place} {number}", path.display()))
    })
}

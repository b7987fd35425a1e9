//! What a text file holds and how it is packed, by the ending of its name.

use std::path::Path;

/// The endings of the files that text is read from, for messages.
pub(crate) const ENDINGS: &str = ".txt or .jsonl, also with .gz or .zst after it, or .parquet";

/// How documents lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Text with a marker between documents.
    Text,
    /// A JSON object in each line.
    Lines,
    /// Rows of a Parquet file.
    Rows,
}

/// How the bytes of a file are compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstandard,
}

impl Content {
    /// By the name of the file; none for a name with another ending.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let inner = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
        match inner.unwrap_or(name).rsplit_once('.')?.1 {
            "txt" => Some(Self::Text),
            "jsonl" => Some(Self::Lines),
            // a Parquet file is compressed inside
            "parquet" if inner.is_none() => Some(Self::Rows),
            _ => None,
        }
    }
}

impl Packing {
    /// By the name of the file.
    pub(crate) fn of(path: &Path) -> Self {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("gz") => Self::Gzip,
            Some("zst") => Self::Zstandard,
            _ => Self::Plain,
        }
    }

    /// By the first bytes of the file.
    pub(crate) fn found(start: &[u8]) -> Self {
        if start.starts_with(b"\x1f\x8b") {
            Self::Gzip
        } else if start.starts_with(b"\x28\xb5\x2f\xfd") {
            Self::Zstandard
        } else {
            Self::Plain
        }
    }

    /// The ending of such files' names.
    pub(crate) fn ending(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip => ".gz",
            Self::Zstandard => ".zst",
        }
    }
}

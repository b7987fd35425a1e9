//! Tokens of text files, made once, kept in a memory-mapped file.
//!
//! Little-endian throughout:
//!
//! ```text
//! 0   magic "DYNATOKS"
//! 8   version u32
//! 12  bytes per token u32: 2 or 4
//! 16  tokens u64
//! 24  documents u64
//! 32  gaps u64
//! 40  key: sha256 of everything the tokens depend on
//! 72  sha256 of (bytes 104 to the end, then bytes 0 to 72)
//! 104 tokens: opening document closing opening document closing …
//! …   documents + 1 offsets u64, in tokens: where each document's opening token stands, and where one would stand next
//! …   gaps, each from u64 to u64, in tokens: tokens on which no loss is taken; ascending
//! ```
//!
//! Where the opening token is the closing one, it stands once between two documents.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail, ensure};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;
use tokenizers::{Encoding, Tokenizer};

use super::format::TextFormat;
use super::pieces::open_text;
use super::records::Document;
use super::source::{DataSource, Documents};
use super::tokenizer::{Framing, largest_id};

const MAGIC: &[u8; 8] = b"DYNATOKS";
const VERSION: u32 = 4;
const HEADER: usize = 104;
/// Where the digest stands in the header.
const DIGEST: usize = 72;
/// Bytes of text tokenized in one parallel batch.
const BATCH_BYTES: usize = 4 << 20;

/// The tokens of one source of text, read from a memory-mapped cache.
pub struct TokenCache {
    map: Mmap,
    source: PathBuf,
    width: usize,
    tokens: usize,
    documents: usize,
    gaps: usize,
}

impl TokenCache {
    /// Opens the cache of `source` in `cache_dir`, tokenizing its files first where there is no sound one.
    ///
    /// `progress` hears the bytes of the files read so far and all of them; it is not called where the cache is used.
    /// Special tokens written out in the text become those tokens, as the tokenizer has it.
    ///
    /// # Errors
    /// Those of [`DataSource::files`] and [`Documents`]; files without documents or that change meanwhile; a cache folder
    /// that cannot be written.
    pub fn open_or_build(
        source: &DataSource,
        format: &TextFormat,
        tokenizer: &Tokenizer,
        framing: Framing,
        cache_dir: &Path,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self> {
        let builder = Builder { source, files: source.files()?, format, tokenizer, framing, progress };
        let stamp = builder.stamp()?;
        let key = builder.key()?;
        let cache = cache_dir.join(format!("{}.tokens", hex(&key)));
        if cache.exists() {
            match Self::open(&cache, &source.path, &key) {
                Ok(tokens) => return Ok(tokens),
                Err(error) => tracing::warn!("{}: {error:#}; tokenizing again", cache.display()),
            }
        }
        let write =
            || format!("{}: the token cache cannot be written; choose another folder", cache_dir.display());
        std::fs::create_dir_all(cache_dir).with_context(write)?;
        let file =
            tempfile::Builder::new().prefix(".tokens.partial").tempfile_in(cache_dir).with_context(write)?;
        builder.write(file.as_file(), &key)?;
        ensure!(builder.stamp()? == stamp, "{}: changed while it was read", source.path.display());
        persist(file, &cache).with_context(write)?;
        Self::open(&cache, &source.path, &key).with_context(|| cache.display().to_string())
    }

    fn open(cache: &Path, source: &Path, key: &[u8; 32]) -> Result<Self> {
        let file = File::open(cache)?;
        // SAFETY: cache files are written under another name and renamed when whole; no process of ours changes
        // one afterwards, only replaces it, and the map keeps the replaced file alive.
        let map = unsafe { Mmap::map(&file)? };
        ensure!(map.len() >= HEADER && map.starts_with(MAGIC), "not a token cache");
        ensure!(u32_at(&map, 8) == VERSION, "token cache of another version");
        ensure!(map[40..DIGEST] == key[..], "token cache of another text");
        let width = u32_at(&map, 12) as usize;
        ensure!(width == 2 || width == 4, "token cache with {width} bytes per token");
        let [tokens, documents, gaps] = [16, 24, 32].map(|at| u64_at(&map, at));
        let offsets = 8 * (u128::from(documents) + 1 + 2 * u128::from(gaps));
        let expected = (width as u128) * u128::from(tokens) + offsets + HEADER as u128;
        ensure!(map.len() as u128 == expected, "token cache of {} bytes, expected {expected}", map.len());
        let digest = Sha256::new().chain_update(&map[HEADER..]).chain_update(&map[..DIGEST]).finalize();
        ensure!(map[DIGEST..HEADER] == digest[..], "token cache with a wrong checksum");
        // The counts are bounded by the file's length, so they fit.
        let cache = Self {
            source: source.to_owned(),
            width,
            tokens: tokens as usize,
            documents: documents as usize,
            gaps: gaps as usize,
            map,
        };
        let offsets = || (0..=cache.documents).map(|document| cache.offset(document));
        let rising = offsets().zip(offsets().skip(1)).all(|(start, end)| start < end);
        ensure!(rising && cache.offset(0) == 0, "token cache with broken offsets");
        let after = cache.tokens.checked_sub(cache.offset(cache.documents));
        ensure!(after.is_some_and(|closing| closing <= 1), "token cache with broken offsets");
        let gaps = (0..cache.gaps).map(|gap| cache.gap(gap));
        let ends: Vec<usize> = gaps.flat_map(|gap| [gap.start, gap.end]).collect();
        let inside = ends.last().is_none_or(|end| *end <= cache.tokens);
        ensure!(ends.is_sorted() && inside, "token cache with broken gaps");
        Ok(cache)
    }

    /// Tokens of the whole stream, those around documents included.
    #[allow(clippy::len_without_is_empty, reason = "a cache is never empty")]
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// The number of documents, at least 1.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// The source that the tokens came from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Where a document stands in the stream, from its opening token to where the next one stands.
    ///
    /// # Panics
    /// Where there is no such document.
    pub fn document_range(&self, document: usize) -> Range<usize> {
        assert!(document < self.documents, "document {document} of {}", self.documents);
        self.offset(document)..self.offset(document + 1)
    }

    /// Where a document stands in the stream, from its opening token to its closing one.
    ///
    /// # Panics
    /// Where there is no such document.
    pub fn framed_range(&self, document: usize) -> Range<usize> {
        let Range { start, end } = self.document_range(document);
        // a closing token that opens the next document as well
        let shared = self.tokens - self.offset(self.documents);
        start..end + shared
    }

    /// A document's tokens, from its opening token to its closing one.
    ///
    /// # Panics
    /// Where there is no such document.
    pub fn framed(&self, document: usize) -> Vec<u32> {
        let range = self.framed_range(document);
        self.slice(range.start, range.len())
    }

    /// Whether the loss is taken on the token at a place of the stream, where it is predicted from those before.
    pub fn counts(&self, place: usize) -> bool {
        let first = self.gap_after(place);
        first == self.gaps || !self.gap(first).contains(&place)
    }

    /// The first gap that ends after a place of the stream.
    fn gap_after(&self, place: usize) -> usize {
        let (mut low, mut high) = (0, self.gaps);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.gap(middle).end <= place { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// Tokens on which no loss is taken.
    fn gap(&self, gap: usize) -> Range<usize> {
        let at = HEADER + self.tokens * self.width + 8 * (self.documents + 1) + 16 * gap;
        u64_at(&self.map, at) as usize..u64_at(&self.map, at + 8) as usize
    }

    /// `length` tokens of the stream from `start`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn slice(&self, start: usize, length: usize) -> Vec<u32> {
        assert!(start + length <= self.tokens, "{length} tokens from {start} of {}", self.tokens);
        let bytes = &self.map[HEADER + start * self.width..][..length * self.width];
        let token = |bytes: &[u8]| bytes.iter().rev().fold(0, |token, &byte| token << 8 | u32::from(byte));
        bytes.chunks_exact(self.width).map(token).collect()
    }

    fn offset(&self, document: usize) -> usize {
        u64_at(&self.map, HEADER + self.tokens * self.width + 8 * document) as usize
    }
}

/// Everything the tokens of a source depend on.
struct Builder<'a> {
    source: &'a DataSource,
    files: Vec<PathBuf>,
    format: &'a TextFormat,
    tokenizer: &'a Tokenizer,
    framing: Framing,
    progress: &'a dyn Fn(u64, u64),
}

impl Builder<'_> {
    fn stamp(&self) -> Result<Vec<(u64, std::time::SystemTime)>> {
        let stamp = |path: &PathBuf| {
            let metadata = open_text(path)?.metadata()?;
            Ok((metadata.len(), metadata.modified()?))
        };
        self.files.iter().map(stamp).collect()
    }

    fn key(&self) -> Result<[u8; 32]> {
        let tokenizer = self.tokenizer.to_string(false).map_err(Error::from_boxed)?;
        let field = self.format.field.as_deref().unwrap_or_default();
        let chat = self.format.chat.as_ref().map(|chat| format!("{chat:?}")).unwrap_or_default();
        let mut key = Sha256::new();
        // Each part is hashed by itself first, so that no two lists of parts read alike.
        let masked = if self.format.mask_prompt { "prompts masked" } else { "" };
        for part in [&self.format.marker, field, &chat, masked, &tokenizer] {
            key.update(Sha256::digest(part));
        }
        for path in &self.files {
            // the ending says how a file is read
            let kind = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            key.update(Sha256::digest(kind));
            let mut text = Sha256::new();
            std::io::copy(&mut open_text(path)?, &mut text)
                .with_context(|| format!("{}: cannot be read", path.display()))?;
            key.update(text.finalize());
        }
        key.update(self.framing.opening.to_le_bytes());
        key.update(self.framing.closing.to_le_bytes());
        key.update(VERSION.to_le_bytes());
        Ok(key.finalize().into())
    }

    /// The tokens of documents; where prompts are masked, also where tokens end in the text.
    fn encode(&self, documents: &[Document]) -> Result<Vec<Encoding>> {
        let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
        let encoded = match self.format.mask_prompt {
            true => self.tokenizer.encode_batch(texts, false),
            false => self.tokenizer.encode_batch_fast(texts, false),
        };
        encoded.map_err(Error::from_boxed)
    }

    /// Tokenizes the files into a cache file, whole but not yet under its name.
    fn write(&self, file: &File, key: &[u8; 32]) -> Result<()> {
        let Framing { opening, closing } = self.framing;
        let largest = largest_id(self.tokenizer).unwrap_or(0).max(opening).max(closing);
        let width = if largest <= u32::from(u16::MAX) { 2 } else { 4 };
        let mut stream = Stream::new(file, width, self.framing)?;
        let all = self.stamp()?.iter().map(|(bytes, _)| bytes).sum();
        let mut before = 0;
        for path in &self.files {
            let mut documents = Documents::open(path, self.format)?;
            loop {
                let batch = next_batch(&mut documents)?;
                if batch.is_empty() {
                    break;
                }
                for (document, encoding) in batch.iter().zip(self.encode(&batch)?) {
                    stream.push(document, &encoding)?;
                }
                (self.progress)((before + documents.position()).min(all), all);
            }
            before += documents.position();
        }
        if stream.offsets.len() == 1 {
            bail!("{}: no documents: there is only white space and markers", self.source.path.display());
        }
        (self.progress)(all, all);
        stream.finish(key)
    }
}

fn next_batch(documents: &mut Documents) -> Result<Vec<Document>> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while bytes < BATCH_BYTES
        && let Some(document) = documents.next().transpose()?
    {
        bytes += document.text.len();
        batch.push(document);
    }
    Ok(batch)
}

/// A cache file being written: tokens first, their digest kept along.
struct Stream<'a> {
    out: BufWriter<&'a File>,
    digest: Sha256,
    width: usize,
    framing: Framing,
    /// Tokens so far.
    tokens: u64,
    offsets: Vec<u64>,
    gaps: Vec<Range<u64>>,
}

impl<'a> Stream<'a> {
    fn new(file: &'a File, width: usize, framing: Framing) -> Result<Self> {
        let mut out = BufWriter::new(file);
        out.seek(SeekFrom::Start(HEADER as u64))?;
        let (digest, offsets) = (Sha256::new(), vec![0]);
        Ok(Self { out, digest, width, framing, tokens: 0, offsets, gaps: Vec::new() })
    }

    /// Appends a document. A closing token at its end, which its text wrote out, takes the place of the one that every
    /// document gets.
    fn push(&mut self, document: &Document, encoding: &Encoding) -> Result<()> {
        let Framing { opening, closing } = self.framing;
        if self.tokens == 0 || !self.framing.is_shared() {
            self.skip(self.tokens);
            self.tokens(&[opening])?;
        }
        let ids = encoding.get_ids();
        let ids = ids.strip_suffix(&[closing]).unwrap_or(ids);
        if !document.counts_whole() {
            for (place, (_, end)) in (self.tokens..).zip(&encoding.get_offsets()[..ids.len()]) {
                if !document.counts(*end) {
                    self.skip(place);
                }
            }
        }
        self.tokens(ids)?;
        if !document.closing_counts() {
            self.skip(self.tokens);
        }
        self.tokens(&[closing])?;
        self.offsets.push(self.tokens - u64::from(self.framing.is_shared()));
        Ok(())
    }

    /// Takes no loss on the token at a place.
    fn skip(&mut self, place: u64) {
        match self.gaps.last_mut() {
            Some(gap) if gap.end == place => gap.end += 1,
            _ => self.gaps.push(place..place + 1),
        }
    }

    fn tokens(&mut self, tokens: &[u32]) -> Result<()> {
        let width = self.width;
        let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes().into_iter().take(width)).collect();
        self.tokens += tokens.len() as u64;
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        self.out.write_all(bytes).context("the token cache cannot be written")
    }

    fn finish(mut self, key: &[u8; 32]) -> Result<()> {
        let (offsets, gaps) = (std::mem::take(&mut self.offsets), std::mem::take(&mut self.gaps));
        let ends = gaps.iter().flat_map(|gap| [gap.start, gap.end]);
        for number in offsets.iter().copied().chain(ends) {
            self.write(&number.to_le_bytes())?;
        }
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.width as u32).to_le_bytes());
        for count in [self.tokens, offsets.len() as u64 - 1, gaps.len() as u64] {
            header.extend_from_slice(&count.to_le_bytes());
        }
        header.extend_from_slice(key);
        let digest = self.digest.chain_update(&header).finalize();
        header.extend_from_slice(&digest);
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&header)?;
        self.out.flush().context("the token cache cannot be written")
    }
}

fn persist(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

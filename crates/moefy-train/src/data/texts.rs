//! Text as one model reads it: its tokenizer, its framing, the token caches of files, and the batches made of them.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use tokenizers::Tokenizer;

use super::closing;
use super::tokenizer::largest_id;
use super::{
    BATCH_TOKENS, Batches, BatchesConfig, Choices, DataSource, DocumentBatches, DocumentLimits, Framing,
    PaddedBatch, Pairs, Split, TextFormat, TokenCache, WeightedCache, load_tokenizer,
};
use dynamoe_model::Checkpoint;
use dynamoe_model::chat::ChatTemplate;
use dynamoe_model::files::cache_dir;

/// Tokens that calibration reads by default.
pub const CALIBRATION_TOKENS: usize = 32_768;

/// Tokens scored of a held-out document.
const SCORED_TOKENS: usize = 512;

/// How text files are read.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Where documents end, and which field holds them.
    pub format: TextFormat,
    /// Folder of tokenized text; none for $XDG_CACHE_HOME/dynamoe or ~/.cache/dynamoe.
    pub cache_dir: Option<PathBuf>,
}

/// The shape of training batches.
#[derive(Debug, Clone, Copy)]
pub struct SampleShape {
    /// Sequences in a batch.
    pub batch_size: usize,
    /// Tokens in a sequence.
    pub sequence_length: usize,
}

/// Reads text for one model.
pub struct Texts {
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    framing: Framing,
    format: TextFormat,
    cache_dir: PathBuf,
    positions: usize,
    vocab_size: usize,
}

/// How held-out text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Each document by itself, at most this many tokens scored.
    Documents(usize),
    /// Packed sequences of this length.
    Packed(usize),
}

impl Texts {
    /// For a model. Where config.json leaves open which token ends a document, the model is asked.
    ///
    /// # Errors
    /// A tokenizer that is missing or does not fit; a chat template that cannot be read; no folder for caches; a model
    /// without a token to tell documents apart.
    pub fn open(model: &Checkpoint, options: &TextOptions) -> Result<Self> {
        let (dir, config) = (model.dir(), model.config());
        let tokenizer = load_tokenizer(dir, config.vocab_size)?;
        Ok(Self {
            framing: closing::framing(model, &tokenizer)?,
            tokenizer,
            format: TextFormat { chat: ChatTemplate::read(dir)?, ..options.format.clone() },
            cache_dir: options.cache_dir.clone().map_or_else(cache_dir, Ok)?,
            positions: config.max_position_embeddings,
            vocab_size: config.vocab_size,
        })
    }

    /// The tokens around documents.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// The model's chat template, if it has one.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.format.chat.as_ref()
    }

    /// The model's `max_position_embeddings`.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Refuses tokens of the file at `path` that lie beyond the embedding.
    fn check_embedded(&self, path: &Path, tokens: &[u32]) -> Result<()> {
        let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab_size) else {
            return Ok(());
        };
        let name = self.tokenizer.id_to_token(*token).unwrap_or_default();
        bail!(
            "{}: the text holds the token {name:?}, whose id {token} lies beyond the embedding (vocab_size {}): remove it \
             from the text",
            path.display(),
            self.vocab_size
        )
    }

    /// Whether the tokenizer has tokens that lie beyond the embedding.
    fn exceeds_embedding(&self) -> bool {
        largest_id(&self.tokenizer).is_some_and(|largest| largest as usize >= self.vocab_size)
    }

    /// The tokens of a source, from the cache or tokenized now.
    ///
    /// # Errors
    /// Those of [`TokenCache::open_or_build`].
    pub fn tokens(&self, source: &DataSource) -> Result<Arc<TokenCache>> {
        let logged = Cell::new(0);
        let progress = |done: u64, all: u64| {
            let percent = done * 100 / all.max(1);
            if percent >= logged.get() + 10 {
                tracing::info!("tokenizing {}: {percent} %", source.path.display());
                logged.set(percent);
            }
        };
        // text of the model's own has its fields whatever those of other text are called
        let field = self.format.field.clone().filter(|_| source.own.is_none());
        let cache = TokenCache::open_or_build(
            source,
            &TextFormat { field, ..self.format.clone() },
            &self.tokenizer,
            self.framing,
            &self.cache_dir,
            &progress,
        )?;
        if self.exceeds_embedding() {
            for document in 0..cache.documents() {
                self.check_embedded(&source.path, &cache.framed(document))?;
            }
        }
        Ok(Arc::new(cache))
    }

    /// Training batches over `sources`; `split` says whether a held-out tail is left.
    ///
    /// # Errors
    /// Unreadable or too little data; sequences longer than the model's positions.
    pub fn training(
        &self,
        sources: &[DataSource],
        split: Split,
        SampleShape { batch_size, sequence_length }: SampleShape,
        seed: u64,
    ) -> Result<Batches> {
        ensure!(
            sequence_length <= self.positions,
            "--sequence-length must be at most the model's {} positions, found {sequence_length}",
            self.positions
        );
        let caches = sources
            .iter()
            .map(|source| Ok(WeightedCache { cache: self.tokens(source)?, weight: source.weight }))
            .collect::<Result<_>>()?;
        Batches::new(caches, BatchesConfig { sequence_length, batch_size, seed, split })
    }

    /// All of `sources` to be scored.
    ///
    /// # Errors
    /// Unreadable or too little data.
    pub fn scored(&self, sources: &[DataSource], scope: Scope) -> Result<Vec<PaddedBatch>> {
        match scope {
            Scope::Documents(max_tokens) => {
                ensure!(max_tokens > 0, "--max-tokens must be 1 or more, found 0");
                let limits =
                    DocumentLimits { max_tokens, positions: self.positions, batch_tokens: BATCH_TOKENS };
                let mut all = Vec::new();
                let mut first = 0;
                for source in sources {
                    let cache = self.tokens(source)?;
                    let batches = DocumentBatches::new(&cache, 0..cache.documents(), limits);
                    all.extend(batches.map(|mut batch| {
                        batch.items.iter_mut().for_each(|item| *item += first);
                        batch
                    }));
                    first += cache.documents();
                }
                Ok(all)
            }
            Scope::Packed(length) => {
                let batches = self.training(sources, Split::All, scored_shape(length), 0)?;
                Ok(in_order(&batches))
            }
        }
    }

    /// What results are measured on: `valid`, document by document, or without it the held-out part of `data`.
    ///
    /// # Errors
    /// Unreadable or too little data.
    pub fn held_out(
        &self,
        data: &[DataSource],
        valid: &[DataSource],
        sequence_length: usize,
    ) -> Result<Vec<PaddedBatch>> {
        if valid.is_empty() {
            return Ok(in_order(&self.training(data, Split::HeldOut, scored_shape(sequence_length), 0)?));
        }
        self.scored(valid, Scope::Documents(SCORED_TOKENS))
    }

    /// Minimal pairs from a .jsonl file.
    ///
    /// # Errors
    /// Those of [`Pairs::read`].
    pub fn pairs(&self, path: &Path) -> Result<Pairs> {
        let pairs = Pairs::read(path, &self.tokenizer, self.framing, self.positions)?;
        pairs.sentences().try_for_each(|sentence| self.check_embedded(path, sentence))?;
        Ok(pairs)
    }

    /// Multiple-choice questions from a .jsonl file.
    ///
    /// # Errors
    /// Those of [`Choices::read`].
    pub fn choices(&self, path: &Path) -> Result<Choices> {
        let choices = Choices::read(path, &self.tokenizer, self.positions)?;
        choices.sequences().try_for_each(|sequence| self.check_embedded(path, sequence))?;
        Ok(choices)
    }

    /// The text that each token adds.
    pub fn pieces(&self, ids: &[u32]) -> Vec<String> {
        let mut before = String::new();
        let mut pieces = Vec::with_capacity(ids.len());
        for end in 1..=ids.len() {
            let text = self.tokenizer.decode(&ids[..end], true).unwrap_or_default();
            let piece = match text.strip_prefix(before.as_str()) {
                Some(added) => added.to_owned(),
                None => self.tokenizer.id_to_token(ids[end - 1]).unwrap_or_default(),
            };
            pieces.push(piece);
            before = text;
        }
        pieces
    }
}

/// Batches of packed sequences as large as measuring takes them.
fn scored_shape(sequence_length: usize) -> SampleShape {
    SampleShape { batch_size: (BATCH_TOKENS / sequence_length.max(1)).max(1), sequence_length }
}

/// All chunks of `batches`, to be scored.
fn in_order(batches: &Batches) -> Vec<PaddedBatch> {
    let mut first = 0;
    batches
        .in_order()
        .map(|batch| {
            first += batch.batch_size;
            PaddedBatch::packed(&batch, first - batch.batch_size)
        })
        .collect()
}

/// The first batches of training that hold at least `tokens` tokens that count, to calibrate on.
pub fn calibration_batches(batches: &Batches, tokens: usize) -> Vec<PaddedBatch> {
    let mut taken = Vec::new();
    let (mut count, mut items) = (0, 0);
    for step in 0.. {
        let batch = batches.batch(step);
        count += batch.counted();
        taken.push(PaddedBatch::packed(&batch, items));
        items += batch.batch_size;
        if count >= tokens || items >= batches.chunks() {
            break;
        }
    }
    taken
}

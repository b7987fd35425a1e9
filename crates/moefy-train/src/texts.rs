//! Text as a model reads it: its tokenizer, its framing, and the token caches of files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::Args;
use tokenizers::Tokenizer;

use crate::data::documents::DocumentLimits;
use crate::data::{
    Batches, BatchesConfig, DataSource, DocumentBatches, Framing, PaddedBatch, Pairs, Split, TextFormat,
    TokenCache, WeightedCache, default_cache_dir, load_tokenizer,
};
use crate::evaluate::score::{BATCH_TOKENS, packed};
use crate::results::{Sample, SampleToken};
use dynamoe_model::config::ModelConfig;

/// Tokens that calibration reads unless told otherwise.
pub const CALIBRATION_TOKENS: usize = 32_768;

/// Tokens scored of a held-out document.
const SCORED_TOKENS: usize = 512;

/// How text files are read.
#[derive(Debug, Clone, Args)]
pub struct TextArgs {
    /// What stands between two documents of a .txt file
    #[arg(long, default_value = "<|endoftext|>")]
    pub marker: String,
    /// The field of a .jsonl file's lines that holds the text
    #[arg(long, default_value = "text")]
    pub field: String,
    /// Folder of tokenized text [default: $XDG_CACHE_HOME/dynamoe or ~/.cache/dynamoe]
    #[arg(long)]
    pub cache_dir: Option<PathBuf>,
}

/// Reads text for one model.
pub struct Texts {
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    framing: Framing,
    format: TextFormat,
    cache_dir: PathBuf,
    positions: usize,
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
    /// For the model in `dir`.
    ///
    /// # Errors
    /// A tokenizer that is missing or does not fit; no folder for caches.
    pub fn open(dir: &Path, config: &ModelConfig, args: &TextArgs) -> Result<Self> {
        Ok(Self {
            tokenizer: load_tokenizer(dir, config.vocab_size)?,
            framing: Framing::new(config.bos_token_id, &config.eos_token_ids, config.vocab_size)?,
            format: TextFormat { marker: args.marker.clone(), field: args.field.clone() },
            cache_dir: args.cache_dir.clone().map_or_else(default_cache_dir, Ok)?,
            positions: config.max_position_embeddings,
        })
    }

    /// The tokens of a file, from the cache or tokenized now.
    ///
    /// # Errors
    /// Those of [`TokenCache::open_or_build`].
    pub fn tokens(&self, source: &DataSource) -> Result<Arc<TokenCache>> {
        let mut told = 0;
        let told = std::cell::RefCell::new(&mut told);
        let progress = |done: u64, all: u64| {
            let percent = done * 100 / all.max(1);
            if percent >= **told.borrow() + 10 {
                tracing::info!("tokenizing {}: {percent} %", source.path.display());
                **told.borrow_mut() = percent;
            }
        };
        let cache = TokenCache::open_or_build(
            source,
            &self.format,
            &self.tokenizer,
            self.framing,
            &self.cache_dir,
            &progress,
        )?;
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
        (batch_size, sequence_length): (usize, usize),
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
                    let batches = DocumentBatches::new(&cache, 0..cache.documents(), self.framing, limits);
                    all.extend(batches.map(|mut batch| {
                        batch.items.iter_mut().for_each(|item| *item += first);
                        batch
                    }));
                    first += cache.documents();
                }
                Ok(all)
            }
            Scope::Packed(length) => {
                let size = (BATCH_TOKENS / length.max(1)).max(1);
                let batches = self.training(sources, Split::All, (size, length), 0)?;
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
            let size = (BATCH_TOKENS / sequence_length.max(1)).max(1);
            return Ok(in_order(&self.training(data, Split::HeldOut, (size, sequence_length), 0)?));
        }
        self.scored(valid, Scope::Documents(SCORED_TOKENS))
    }

    /// Minimal pairs from a .jsonl file.
    ///
    /// # Errors
    /// Those of [`Pairs::read`].
    pub fn pairs(&self, path: &Path) -> Result<Pairs> {
        Pairs::read(path, &self.tokenizer, self.framing, self.positions)
    }

    /// A sample text from the tokens of a batch's first row and what the model made of it.
    pub fn sample(&self, ids: &[u32], sensitivity: f64, source: &str, measured: &TokenUse<'_>) -> Sample {
        let layers = measured.width_per_layer.len().max(1) as f64;
        let texts = self.pieces(ids);
        let tokens = texts.into_iter().enumerate().map(|(at, text)| {
            let width_per_layer: Vec<f64> = measured.width_per_layer.iter().map(|w| w[at]).collect();
            let width = width_per_layer.iter().sum::<f64>() / layers;
            // a token's loss was measured where the one before it was read
            let loss = at.checked_sub(1).map(|before| f64::from(measured.losses[before]));
            SampleToken { text, width, width_per_layer, loss }
        });
        Sample { sensitivity, source: source.to_owned(), tokens: tokens.collect() }
    }

    /// The text that each token adds.
    fn pieces(&self, ids: &[u32]) -> Vec<String> {
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

/// What a model used and lost on each token of a text.
pub struct TokenUse<'a> {
    /// For each layer, each token's width as a share of the dense width.
    pub width_per_layer: &'a [Vec<f64>],
    /// The loss of predicting the token after each.
    pub losses: &'a [f32],
}

/// All chunks of `batches`, to be scored.
pub fn in_order(batches: &Batches) -> Vec<PaddedBatch> {
    let mut first = 0;
    batches
        .in_order()
        .map(|batch| {
            first += batch.batch_size;
            packed(&batch, first - batch.batch_size)
        })
        .collect()
}

/// The first batches of training that hold at least `tokens` tokens, to calibrate on.
pub fn calibration(batches: &Batches, tokens: usize) -> Vec<PaddedBatch> {
    let mut taken = Vec::new();
    let (mut count, mut items) = (0, 0);
    for step in 0.. {
        let batch = batches.batch(step);
        count += batch.targets();
        taken.push(packed(&batch, items));
        items += batch.batch_size;
        if count >= tokens || items >= batches.chunks() {
            break;
        }
    }
    taken
}

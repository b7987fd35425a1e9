//! Packed training batches, a pure function of the step, so that a resumed run needs no reader state.
//!
//! A source's stream is cut into chunks of `T + 1` tokens that start `T` apart: every token but the first of the
//! stream is a target once, and what is left at the end is dropped. An epoch holds each chunk of a source `weight`
//! times, in an order drawn from (seed, epoch).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::cache::TokenCache;
use crate::locks::lock;
use crate::random;

/// Which part of every source is used.
///
/// Held out is the tail: the last documents that together hold at least 1 % of the tokens and one chunk. Where
/// that would be more than a tenth of the source and more than twice what is needed (few, long documents), the
/// stream is cut inside a document instead. Either way no token is in both parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The whole source, when validation text comes from elsewhere.
    All,
    /// All but the held-out tail.
    Train,
    /// The held-out tail.
    HeldOut,
}

impl Split {
    /// The part of the stream of `cache` that this split covers, in tokens, for chunks of `sequence_length` + 1.
    pub fn range(self, cache: &TokenCache, sequence_length: usize) -> Range<usize> {
        let tokens = cache.len();
        let start = held_out_start(cache, sequence_length);
        match self {
            Self::All => 0..tokens,
            Self::Train => 0..start,
            Self::HeldOut => start..tokens,
        }
    }
}

fn held_out_start(cache: &TokenCache, sequence_length: usize) -> usize {
    let tokens = cache.len();
    let wanted = tokens.div_ceil(100).max(sequence_length + 1).min(tokens);
    let by_document = (0..cache.documents())
        .rev()
        .map(|document| cache.document_range(document).start)
        .find(|start| tokens - start >= wanted)
        .unwrap_or(0);
    let too_much = tokens - by_document > (tokens / 10).max(2 * wanted);
    if too_much { tokens - wanted } else { by_document }
}

/// A source of packed chunks and how often each of them is seen per epoch.
#[derive(Clone)]
pub struct WeightedCache {
    /// The tokens.
    pub cache: Arc<TokenCache>,
    /// Times per epoch, positive: 2 is twice, 0.5 every second epoch.
    pub weight: f64,
}

/// The shape and order of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchesConfig {
    /// `T`, positions per sequence.
    pub sequence_length: usize,
    /// `B`, sequences per batch.
    pub batch_size: usize,
    /// Seed of the order.
    pub seed: u64,
    /// The part of every source that is used.
    pub split: Split,
}

/// Where a sequence came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Index of the source.
    pub source: usize,
    /// Index of the chunk in the used part of the source.
    pub chunk: usize,
}

/// `B` sequences of `T + 1` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `B`.
    pub batch_size: usize,
    /// `T`.
    pub sequence_length: usize,
    /// (B, T + 1) in row order: inputs are all but the last of a row, targets all but the first.
    pub tokens: Vec<u32>,
    /// 1 for a target that counts, 0 for one on which no loss is taken, (B, T).
    pub weights: Vec<f32>,
    /// Where each row came from, (B).
    pub origins: Vec<Origin>,
}

impl Batch {
    /// Inputs and targets, each (B, T) u32, contiguous, and the targets' weights, (B, T) f32.
    ///
    /// # Errors
    /// The device's.
    pub fn tensors(&self, device: &Device) -> Result<(Tensor, Tensor, Tensor)> {
        let (rows, length) = (self.batch_size, self.sequence_length);
        let tokens = Tensor::from_slice(&self.tokens, (rows, length + 1), device)?;
        let weights = Tensor::from_slice(&self.weights, (rows, length), device)?;
        Ok((tokens.narrow(1, 0, length)?.contiguous()?, tokens.narrow(1, 1, length)?.contiguous()?, weights))
    }

    /// Targets that count.
    pub fn counted(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }
}

struct Source {
    cache: Arc<TokenCache>,
    /// Where the used part starts in the stream.
    start: usize,
    chunks: usize,
    /// Chunks drawn in one epoch.
    draws: usize,
}

/// An endless, seeded sequence of batches.
pub struct Batches {
    sources: Vec<Source>,
    config: BatchesConfig,
    /// Chunks in an epoch, over all sources.
    epoch_length: u64,
    /// The last epoch's order: computed anew when another is asked for.
    order: Mutex<Option<(u64, Arc<Vec<Origin>>)>>,
}

/// Sequences of an epoch at most: the order of an epoch is kept in memory.
const LONGEST_EPOCH: u64 = 1 << 28;

impl Batches {
    /// Cuts the sources into chunks.
    ///
    /// # Errors
    /// No source; a length or batch size of 0; a weight that is not positive, or so large that an epoch does not fit into
    /// memory; a source with less than one chunk.
    pub fn new(caches: Vec<WeightedCache>, config: BatchesConfig) -> Result<Self> {
        ensure!(!caches.is_empty(), "expected at least one data source, found none");
        ensure!(config.sequence_length > 0, "the sequence length must be at least 1");
        ensure!(config.batch_size > 0, "the batch size must be at least 1");
        let sources: Result<Vec<Source>> = caches.into_iter().map(|cache| source(cache, config)).collect();
        let sources = sources?;
        let epoch_length = sources.iter().map(|source| source.draws as u64).fold(0, u64::saturating_add);
        ensure!(
            epoch_length <= LONGEST_EPOCH,
            "the weights of the data make an epoch of {epoch_length} sequences: expected at most {LONGEST_EPOCH}; \
             give smaller weights"
        );
        Ok(Self { sources, config, epoch_length, order: Mutex::new(None) })
    }

    /// Chunks of all sources, weights aside.
    pub fn chunks(&self) -> usize {
        self.sources.iter().map(|source| source.chunks).sum()
    }

    /// Sequences in an epoch.
    pub fn epoch_length(&self) -> u64 {
        self.epoch_length
    }

    /// The batch of `step`: sequences `step·B` to `(step + 1)·B` of the endless sequence of epochs.
    pub fn batch(&self, step: u64) -> Batch {
        let size = self.config.batch_size as u64;
        let origins = (0..size).map(|row| {
            let index = u128::from(step) * u128::from(size) + u128::from(row);
            let epoch = (index / u128::from(self.epoch_length)) as u64;
            let place = (index % u128::from(self.epoch_length)) as usize;
            self.order(epoch)[place]
        });
        self.gather(origins.collect())
    }

    /// Every chunk once, source by source in the order of the text, for evaluation; the last batch may be smaller.
    pub fn in_order(&self) -> impl Iterator<Item = Batch> + '_ {
        let origins: Vec<Origin> = self
            .sources
            .iter()
            .enumerate()
            .flat_map(|(source, cut)| (0..cut.chunks).map(move |chunk| Origin { source, chunk }))
            .collect();
        let batches = origins.len().div_ceil(self.config.batch_size);
        (0..batches).map(move |batch| {
            let start = batch * self.config.batch_size;
            let end = origins.len().min(start + self.config.batch_size);
            self.gather(origins[start..end].to_vec())
        })
    }

    /// Names a sequence for an error message: the file and the tokens of its stream.
    pub fn describe(&self, origin: Origin) -> String {
        let source = &self.sources[origin.source];
        let start = source.start + origin.chunk * self.config.sequence_length;
        let end = start + self.config.sequence_length;
        format!("{}, tokens {start} to {end}", source.cache.source().display())
    }

    fn gather(&self, origins: Vec<Origin>) -> Batch {
        let length = self.config.sequence_length;
        let mut tokens = Vec::with_capacity(origins.len() * (length + 1));
        let mut weights = Vec::with_capacity(origins.len() * length);
        for origin in &origins {
            let source = &self.sources[origin.source];
            let start = source.start + origin.chunk * length;
            tokens.extend(source.cache.slice(start, length + 1));
            let targets = start + 1..=start + length;
            weights.extend(targets.map(|place| f32::from(u8::from(source.cache.counts(place)))));
        }
        Batch { batch_size: origins.len(), sequence_length: length, tokens, weights, origins }
    }

    fn order(&self, epoch: u64) -> Arc<Vec<Origin>> {
        // A panic elsewhere cannot leave a wrong order behind: it is stored whole.
        let mut kept = lock(&self.order);
        match &*kept {
            Some((kept_epoch, order)) if *kept_epoch == epoch => order.clone(),
            _ => {
                let order = Arc::new(self.epoch_order(epoch));
                *kept = Some((epoch, order.clone()));
                order
            }
        }
    }

    /// The draws of one epoch, shuffled. A source's draws go through it pass by pass, so no chunk is drawn again
    /// before all others of its source.
    fn epoch_order(&self, epoch: u64) -> Vec<Origin> {
        let mut order = Vec::with_capacity(self.epoch_length as usize);
        for (index, source) in self.sources.iter().enumerate() {
            let mut left = source.draws;
            let mut draw = u128::from(epoch) * source.draws as u128;
            while left > 0 {
                let pass = (draw / source.chunks as u128) as u64;
                let skip = (draw % source.chunks as u128) as usize;
                let take = left.min(source.chunks - skip);
                let chunks =
                    permutation(source.chunks, random::data_order(self.config.seed, 1 + index as u64, pass));
                let origins = chunks[skip..skip + take].iter().map(|&chunk| Origin { source: index, chunk });
                order.extend(origins);
                left -= take;
                draw += take as u128;
            }
        }
        order.shuffle(&mut random::data_order(self.config.seed, 0, epoch));
        order
    }
}

fn permutation(length: usize, mut rng: ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..length).collect();
    order.shuffle(&mut rng);
    order
}

fn source(WeightedCache { cache, weight }: WeightedCache, config: BatchesConfig) -> Result<Source> {
    let path = cache.source().display();
    ensure!(weight.is_finite() && weight > 0.0, "{path}: the weight must be positive, found {weight}");
    let length = config.sequence_length;
    let range = config.split.range(&cache, length);
    let chunks = range.len().saturating_sub(1) / length;
    let part = match config.split {
        Split::All => "",
        Split::Train => " left for training after the held-out part",
        Split::HeldOut => " in the held-out part",
    };
    ensure!(
        chunks > 0,
        "{path}: {} tokens{part}, but one sequence needs {}: give more text or a shorter sequence length",
        range.len(),
        length + 1
    );
    let draws = (chunks as f64 * weight).round().max(1.0) as usize;
    Ok(Source { start: range.start, chunks, draws, cache })
}

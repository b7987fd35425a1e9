//! Documents scored one by one: the opening token first, the context reset for each.

use std::ops::Range;

use super::cache::TokenCache;
use super::padded::{PaddedBatch, group_by_length};

/// Padded batches of documents of similar length, longest first.
///
/// A document is framed `opening ids… closing` ([`Framing`](super::Framing)). Its inputs are the first `N` tokens of that,
/// its targets the tokens after each, `N` being at most `max_tokens` and the model's positions. So the closing token is
/// scored where the document was not cut.
pub struct DocumentBatches<'a> {
    cache: &'a TokenCache,
    max_inputs: usize,
    groups: std::vec::IntoIter<Vec<usize>>,
}

/// Limits of [`DocumentBatches`], in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DocumentLimits {
    /// Scored tokens per document, at least 1.
    pub max_tokens: usize,
    /// The model's `max_position_embeddings`.
    pub positions: usize,
    /// Positions of one padded batch, `B · T`; a longer document makes a batch of its own.
    pub batch_tokens: usize,
}

impl<'a> DocumentBatches<'a> {
    /// Batches of the given documents of `cache`.
    ///
    /// # Panics
    /// Where `documents` goes beyond those of the cache.
    pub fn new(cache: &'a TokenCache, documents: Range<usize>, limits: DocumentLimits) -> Self {
        let max_inputs = limits.max_tokens.min(limits.positions).max(1);
        let lengths =
            documents.map(|document| (document, (cache.framed_range(document).len() - 1).min(max_inputs)));
        let groups = group_by_length(lengths.collect(), limits.batch_tokens).into_iter();
        Self { cache, max_inputs, groups }
    }
}

impl Iterator for DocumentBatches<'_> {
    type Item = PaddedBatch;

    fn next(&mut self) -> Option<PaddedBatch> {
        let group = self.groups.next()?;
        let sequences = group.into_iter().map(|document| {
            let mut tokens = self.cache.framed(document);
            tokens.truncate(self.max_inputs + 1);
            (document, tokens)
        });
        let mut batch = PaddedBatch::new(&sequences.collect::<Vec<_>>());
        for (weights, &document) in batch.weights.chunks_exact_mut(batch.length).zip(&batch.items) {
            let targets = self.cache.framed_range(document).skip(1);
            for (weight, place) in weights.iter_mut().zip(targets) {
                if !self.cache.counts(place) {
                    *weight = 0.0;
                }
            }
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.groups.size_hint()
    }
}

impl ExactSizeIterator for DocumentBatches<'_> {}

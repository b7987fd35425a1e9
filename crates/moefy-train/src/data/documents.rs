//! Documents scored one by one: the boundary token first, the context reset for each.

use std::ops::Range;

use super::cache::TokenCache;
use super::padded::{PaddedBatch, group_by_length};
use super::tokenizer::Framing;

/// Padded batches of documents of similar length, longest first.
///
/// A document is framed `[BOS] ids… [BOS]` (EOS where the model has no BOS). Its inputs are the first `N` tokens of
/// that, its targets the tokens after each, `N` being at most `max_tokens` and the model's positions. So the
/// closing boundary is scored where the document was not cut.
pub struct DocumentBatches<'a> {
    cache: &'a TokenCache,
    framing: Framing,
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
    pub fn new(
        cache: &'a TokenCache,
        documents: Range<usize>,
        framing: Framing,
        limits: DocumentLimits,
    ) -> Self {
        let max_inputs = limits.max_tokens.min(limits.positions).max(1);
        let lengths =
            documents.map(|document| (document, cache.document_range(document).len().min(max_inputs)));
        let groups = group_by_length(lengths.collect(), limits.batch_tokens).into_iter();
        Self { cache, framing, max_inputs, groups }
    }
}

impl Iterator for DocumentBatches<'_> {
    type Item = PaddedBatch;

    fn next(&mut self) -> Option<PaddedBatch> {
        let group = self.groups.next()?;
        let sequences: Vec<(usize, Vec<u32>)> = group
            .into_iter()
            .map(|document| {
                let mut tokens = self.cache.document(document);
                tokens.push(self.framing.boundary);
                tokens.truncate(self.max_inputs + 1);
                (document, tokens)
            })
            .collect();
        Some(PaddedBatch::new(&sequences))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.groups.size_hint()
    }
}

impl ExactSizeIterator for DocumentBatches<'_> {}

//! Minimal pairs (BLiMP): two sentences that differ in one word, a good one and a bad one. A model is right if it finds the
//! good one more likely.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Error, Result, ensure};
use tokenizers::Tokenizer;

use super::padded::{PaddedBatch, group_by_length};
use super::pieces::JsonLines;
use super::records::string_field;
use super::tokenizer::Framing;
use crate::report::results::PairsPoint;

/// Tokenized minimal pairs.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// Each is `opening ids…`. Item `2i` is the good sentence of pair `i`, item `2i + 1` the bad one.
    sentences: Vec<Vec<u32>>,
    /// The `field` of each pair, empty if it has none.
    fields: Vec<String>,
}

impl Pairs {
    /// Reads a `.jsonl` file whose objects hold `good`, `bad` and optionally `field`.
    ///
    /// # Errors
    /// A missing or empty file; a line that is no JSON object with both sentences; a sentence without tokens or with more
    /// than the model's `positions`. Errors of a line give its number.
    pub fn read(path: &Path, tokenizer: &Tokenizer, framing: Framing, positions: usize) -> Result<Self> {
        let mut pairs = Self { sentences: Vec::new(), fields: Vec::new() };
        for line in JsonLines::open(path)? {
            let (number, object) = line?;
            let place = || format!("{}: line {number}", path.display());
            for key in ["good", "bad"] {
                let text = string_field(&object, key).with_context(place)?;
                let encoding =
                    tokenizer.encode_fast(text, false).map_err(Error::from_boxed).with_context(place)?;
                let ids = encoding.get_ids();
                let (found, name) = (ids.len(), place());
                ensure!(found > 0, "{name}: the {key} sentence has no tokens");
                ensure!(
                    found <= positions,
                    "{name}: the {key} sentence has {found} tokens, the model takes {positions}"
                );
                pairs.sentences.push(std::iter::once(framing.opening).chain(ids.iter().copied()).collect());
            }
            pairs
                .fields
                .push(object.get("field").and_then(|field| field.as_str()).unwrap_or_default().to_owned());
        }
        ensure!(!pairs.fields.is_empty(), "{}: no pairs: the file holds only white space", path.display());
        Ok(pairs)
    }

    /// The number of pairs, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// The tokens of each sentence, the opening first.
    pub(crate) fn sentences(&self) -> impl Iterator<Item = &[u32]> {
        self.sentences.iter().map(Vec::as_slice)
    }

    /// All sentences in padded batches of at most `batch_tokens` positions, longest first. A batch's `items` are
    /// sentences: `2i` the good one of pair `i`, `2i + 1` the bad one.
    pub fn batches(&self, batch_tokens: usize) -> impl ExactSizeIterator<Item = PaddedBatch> + '_ {
        let lengths = self.sentences.iter().map(|sentence| sentence.len() - 1).enumerate().collect();
        group_by_length(lengths, batch_tokens).into_iter().map(|group| {
            let sequences: Vec<_> =
                group.into_iter().map(|item| (item, self.sentences[item].clone())).collect();
            PaddedBatch::new(&sequences)
        })
    }

    /// The model's accuracy, from the log-likelihoods of all sentences, indexed as the batches' `items`. The dial and the
    /// width are left to the caller.
    ///
    /// # Errors
    /// Not two values for each pair.
    pub fn score(&self, log_likelihoods: &[f64]) -> Result<PairsPoint> {
        let expected = self.sentences.len();
        ensure!(
            log_likelihoods.len() == expected,
            "expected {expected} log-likelihoods, two per pair, found {}",
            log_likelihoods.len()
        );
        let mut by_field: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        let mut right = Vec::with_capacity(self.len());
        for (pair, field) in log_likelihoods.chunks_exact(2).zip(&self.fields) {
            let hit = pair[0] > pair[1];
            right.push(hit);
            if !field.is_empty() {
                let counts = by_field.entry(field.clone()).or_default();
                *counts = (counts.0 + usize::from(hit), counts.1 + 1);
            }
        }
        let pairs = self.len();
        let accuracy = right.iter().filter(|right| **right).count() as f64 / pairs as f64;
        let stderr = (accuracy * (1.0 - accuracy) / pairs as f64).sqrt();
        let by_field =
            by_field.into_iter().map(|(field, (hits, all))| (field, hits as f64 / all as f64)).collect();
        Ok(PairsPoint { pairs, accuracy, stderr, by_field, right, ..PairsPoint::default() })
    }
}

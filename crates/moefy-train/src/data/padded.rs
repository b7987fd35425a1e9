//! Sequences of different lengths in one batch: inputs, shifted targets and weights, padded at the end.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::batches::Batch;

/// Positions of one batch while measuring.
pub const BATCH_TOKENS: usize = 4096;

/// `B` sequences, padded to the longest, `T` positions.
///
/// Padding stands at the end, so under causal attention it changes no real position; its weight is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct PaddedBatch {
    /// `B`.
    pub batch_size: usize,
    /// `T`.
    pub length: usize,
    /// Inputs, (B, T) in row order.
    pub tokens: Vec<u32>,
    /// The token after each input, (B, T); 0 in the padding.
    pub targets: Vec<u32>,
    /// 1 for a target that counts, 0 for padding and for a target on which no loss is taken, (B, T).
    pub weights: Vec<f32>,
    /// Which document or sentence each row is, (B).
    pub items: Vec<usize>,
}

impl PaddedBatch {
    /// Pads `sequences` (item, tokens): inputs are all tokens but the last, targets all but the first.
    pub(crate) fn new(sequences: &[(usize, Vec<u32>)]) -> Self {
        let batch_size = sequences.len();
        let length = sequences.iter().map(|(_, tokens)| tokens.len().saturating_sub(1)).max().unwrap_or(0);
        let mut batch = Self {
            batch_size,
            length,
            tokens: vec![0; batch_size * length],
            targets: vec![0; batch_size * length],
            weights: vec![0.0; batch_size * length],
            items: sequences.iter().map(|(item, _)| *item).collect(),
        };
        for (row, (_, sequence)) in sequences.iter().enumerate() {
            for (position, pair) in sequence.windows(2).enumerate() {
                let index = row * length + position;
                batch.tokens[index] = pair[0];
                batch.targets[index] = pair[1];
                batch.weights[index] = 1.0;
            }
        }
        batch
    }

    /// A training batch as one to be scored, each sequence an item; the first has number `first_item`.
    pub fn packed(batch: &Batch, first_item: usize) -> Self {
        let row = batch.sequence_length + 1;
        let part = |range: std::ops::Range<usize>| -> Vec<u32> {
            batch.tokens.chunks_exact(row).flat_map(|tokens| tokens[range.clone()].to_vec()).collect()
        };
        Self {
            batch_size: batch.batch_size,
            length: batch.sequence_length,
            tokens: part(0..row - 1),
            targets: part(1..row),
            weights: batch.weights.clone(),
            items: (first_item..first_item + batch.batch_size).collect(),
        }
    }

    /// How many targets count.
    pub fn scored(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }

    /// Inputs (B, T) u32, targets (B, T) u32 and weights (B, T) f32.
    ///
    /// # Errors
    /// The device's.
    pub fn tensors(&self, device: &Device) -> Result<(Tensor, Tensor, Tensor)> {
        let shape = (self.batch_size, self.length);
        Ok((
            Tensor::from_slice(&self.tokens, shape, device)?,
            Tensor::from_slice(&self.targets, shape, device)?,
            Tensor::from_slice(&self.weights, shape, device)?,
        ))
    }
}

/// How many tokens are scored of the `batches` that are not this rank's `own`.
pub(crate) fn scored_by_others(batches: &[PaddedBatch], own: &[usize]) -> u64 {
    scored_tokens(batches) - own.iter().map(|&index| batches[index].scored() as u64).sum::<u64>()
}

/// How many tokens of `batches` are scored.
pub fn scored_tokens(batches: &[PaddedBatch]) -> u64 {
    batches.iter().map(|batch| batch.scored() as u64).sum()
}

/// Every `n`-th batch, so that about `tokens` tokens are taken, but at least one batch: batches are sorted by length, so the
/// first ones would not be like the rest.
pub fn subsample(batches: &[PaddedBatch], tokens: usize) -> Vec<PaddedBatch> {
    let all: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let step = (all / tokens.max(1)).clamp(1, batches.len().max(1));
    batches.iter().skip(step / 2).step_by(step).cloned().collect()
}

/// Groups items of similar length: `(item, inputs)` to lists of items whose padded batch holds at most
/// `max_positions` positions (a single longer item makes a batch of its own), longest first.
pub(crate) fn group_by_length(mut lengths: Vec<(usize, usize)>, max_positions: usize) -> Vec<Vec<usize>> {
    lengths.sort_by_key(|&(item, length)| (std::cmp::Reverse(length), item));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    let mut longest = 0;
    for (item, length) in lengths {
        match groups.last_mut() {
            Some(group) if room >= longest => group.push(item),
            _ => {
                groups.push(vec![item]);
                longest = length;
                room = max_positions;
            }
        }
        room = room.saturating_sub(longest);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_a_batch_of_any_text() {
        let batch = |item| PaddedBatch::new(&[(item, vec![1; 101])]);
        for count in 1..20 {
            let batches: Vec<PaddedBatch> = (0..count).map(batch).collect();
            for tokens in [0, 1, 100, 450, 5000] {
                let sample = subsample(&batches, tokens);
                let most = batches.len().min((2 * tokens / 100).max(1));
                assert!((1..=most).contains(&sample.len()), "{count} {tokens}: {}", sample.len());
            }
        }
        assert!(subsample(&[], 10).is_empty());
    }
}

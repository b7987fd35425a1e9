//! What is written.

use dynamoe_model::ModelConfig;
use dynamoe_model::model::Decoder;
use serde::Serialize;

/// Documents in a group: enough for matrix products to be fast. Their blocks of rows are as many as a power of two.
const GROUP: usize = 128;
/// Documents in a group where few tokens are missing.
const SMALL_GROUP: usize = 16;
/// Bytes that the keys and values of a group may take.
const CACHE: usize = 1 << 30;

/// All that decides the text besides the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// Tokens to write at least, as training counts them.
    pub tokens: u64,
    /// Of the random numbers.
    pub seed: u64,
    /// Tokens of a document at most.
    pub sequence_length: usize,
    /// Whether every document is a conversation with an answer, whose prompt is not trained on.
    pub answers_only: bool,
}

impl Plan {
    /// Documents of the group that is written after this many tokens.
    pub(super) fn group(&self, config: &ModelConfig, written: u64) -> usize {
        let fit = CACHE / Decoder::bytes(config, self.sequence_length).max(1);
        let missing = self.tokens.saturating_sub(written).div_ceil(self.sequence_length as u64);
        let wanted = usize::try_from(missing).unwrap_or(GROUP).clamp(SMALL_GROUP, GROUP);
        1 << wanted.min(fit.max(1)).ilog2()
    }
}

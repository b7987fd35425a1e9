//! How much one request may ask for: everything that a few bytes can multiply.

use super::refused;
use crate::serve::error::ApiResult;

/// Limits of one request.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Limits {
    /// Answers to one prompt (`n`, `best_of`).
    pub choices: u64,
    /// Likeliest tokens told for each position (`top_logprobs`, `logprobs`).
    pub top_logprobs: u64,
    /// Bytes of all prompts or of all messages together.
    pub prompt_bytes: usize,
    /// Tokens of all answers together.
    pub answer_tokens: usize,
    /// Bytes of the logits of a prompt whose log probabilities are asked for.
    pub logits_bytes: usize,
}

/// Stop strings of a request.
pub(super) const STOPS: usize = 16;
/// Tokens with a bias of their own.
pub(super) const BIASES: usize = 1024;
/// Tools that a request describes.
pub(super) const TOOLS: usize = 128;
/// Bytes of a grammar, a schema, all stop strings, all tools.
pub(super) const PATTERN_BYTES: usize = 64 << 10;

/// Refuses more than `most` of something.
pub(in super::super) fn at_most(field: &str, found: u64, most: u64, of: &str) -> ApiResult<()> {
    if found > most {
        return Err(refused(field, format_args!("expected at most {most}{of}, found {found}")));
    }
    Ok(())
}

/// Refuses a number that is outside of a range.
pub(super) fn within(field: &str, number: Option<f64>, from: f64, to: f64) -> ApiResult<Option<f64>> {
    match number {
        Some(number) if !(from..=to).contains(&number) => {
            let range =
                if to == f64::INFINITY { format!("{from} or more") } else { format!("{from} to {to}") };
            Err(refused(field, format_args!("expected {range}, found {number}")))
        }
        number => Ok(number),
    }
}

impl Limits {
    /// Checks `n` or `best_of`.
    pub fn choices(&self, field: &str, count: Option<u64>) -> ApiResult<usize> {
        let count = count.unwrap_or(1);
        if count == 0 {
            return Err(refused(field, "expected at least 1, found 0"));
        }
        at_most(field, count, self.choices, "")?;
        Ok(count as usize)
    }

    /// Checks the bytes of a prompt.
    pub fn prompt(&self, field: &str, bytes: usize) -> ApiResult<()> {
        at_most(field, bytes as u64, self.prompt_bytes as u64, " bytes of text")
    }
}

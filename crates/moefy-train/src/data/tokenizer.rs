//! The model's tokenizer and the token that stands between documents.

use std::path::Path;

use anyhow::{Context, Error, Result, bail, ensure};
use dynamoe_model::files::read_file;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::panics::without_panic;

/// Reads `dir/tokenizer.json` for a model with `vocab_size` rows in its embedding. Tokens that were added to the
/// vocabulary may lie beyond the embedding, as a token for padding often does; [`super::Texts`] refuses text that uses
/// them.
///
/// Truncation and padding that the file may ask for are switched off.
///
/// # Errors
/// A missing or broken file; a token of the vocabulary itself whose id lies beyond the embedding.
pub fn load_tokenizer(dir: &Path, vocab_size: usize) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let bytes = read_file(&path).with_context(|| {
        format!("{}: cannot be read; a model folder needs its tokenizer.json", path.display())
    })?;
    let mut tokenizer = without_panic("the tokenizers library", || {
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(Error::from_boxed)?;
        try_out(&tokenizer)?;
        Ok(tokenizer)
    })
    .with_context(|| {
        format!("{}: not a tokenizer; use the tokenizer.json that came with the model", path.display())
    })?;
    let largest = tokenizer.get_vocab(false).into_values().max();
    let largest = largest.with_context(|| format!("{}: no tokens", path.display()))?;
    ensure!(
        (largest as usize) < vocab_size,
        "{}: the tokenizer does not fit the embedding: its largest token id is {largest}, vocab_size is \
         {vocab_size}; use the tokenizer.json that came with the model",
        path.display()
    );
    tokenizer.with_truncation(None).map_err(Error::from_boxed)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// BOS and EOS that `dir/tokenizer_config.json` names, where it does.
pub(crate) fn named_ends(dir: &Path, tokenizer: &Tokenizer) -> [Option<u32>; 2] {
    let text = std::fs::read(dir.join("tokenizer_config.json")).unwrap_or_default();
    let config: Value = serde_json::from_slice(&text).unwrap_or_default();
    ["bos_token", "eos_token"].map(|key| {
        let token = config.get(key)?;
        tokenizer.token_to_id(token.get("content").unwrap_or(token).as_str()?)
    })
}

/// Reads and writes a little text of many kinds: a file may parse and yet break the tokenizer that it describes.
fn try_out(tokenizer: &Tokenizer) -> Result<()> {
    for text in [
        "",
        " ",
        "The quick brown fox, 3.14!\n",
        "na\u{ef}ve caf\u{e9} \u{4e2d}\u{6587} \u{1f600}\u{200d}",
        "<s>",
    ] {
        let ids = tokenizer.encode_fast(text, true).map_err(Error::from_boxed)?;
        tokenizer.decode(ids.get_ids(), false).map_err(Error::from_boxed)?;
        tokenizer.decode(ids.get_ids(), true).map_err(Error::from_boxed)?;
    }
    Ok(())
}

/// The largest token id, added tokens included.
pub(crate) fn largest_id(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.get_vocab(true).into_values().max()
}

/// The tokens around a document.
///
/// Where both are the same token, one stands between two documents: it closes one and opens the next. Else a stream is
/// `opening doc closing opening doc closing …`, and no loss is taken on the opening token: nothing in use asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// In front of every document: BOS, or EOS for a model without BOS (Qwen).
    pub opening: u32,
    /// After every document: the token by which the model says that a text is over.
    pub closing: u32,
}

impl Framing {
    /// The framing by config.json's `bos_token_id` and `eos_token_id` alone: EOS closes, or BOS in a model without EOS.
    ///
    /// # Errors
    /// A model that has neither, or whose token lies beyond the embedding.
    pub fn new(bos_token_id: Option<u32>, eos_token_ids: &[u32], vocab_size: usize) -> Result<Self> {
        let eos = eos_token_ids.first().copied();
        let (Some(opening), Some(closing)) = (bos_token_id.or(eos), eos.or(bos_token_id)) else {
            bail!(
                "config.json has neither bos_token_id nor eos_token_id, and neither generation_config.json nor \
                 tokenizer_config.json names these tokens: documents could not be told apart"
            )
        };
        for (place, token) in [("in front of", opening), ("after", closing)] {
            ensure!(
                (token as usize) < vocab_size,
                "the token {place} documents does not fit the embedding: its id is {token}, vocab_size is {vocab_size}"
            );
        }
        Ok(Self { opening, closing })
    }

    /// Whether one token stands between two documents.
    pub fn is_shared(self) -> bool {
        self.opening == self.closing
    }
}

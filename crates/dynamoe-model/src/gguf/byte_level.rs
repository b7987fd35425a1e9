//! A tokenizer that merges the bytes of words (GPT-2, Llama 3, Qwen), as tokenizer.json.
//!
//! It does what the model was trained with, also where llama.cpp does not: Qwen's text is normalized, for example.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::header::{self, Gguf};
use super::vocabulary::{GIVE_ONE, Vocabulary};

/// How a family of tokenizers cuts text into words before it merges bytes.
struct Words {
    /// Its name in `tokenizer.ggml.pre`.
    name: &'static str,
    /// One expression for all words; none for GPT-2's.
    pattern: Option<&'static str>,
    /// Each digit is a word.
    digits: bool,
    /// Text is brought into Unicode's composed form first.
    composed: bool,
    /// A word that is a token is taken as it is.
    whole_words: bool,
    /// A text begins with BOS unless the file says otherwise.
    bos: bool,
}

const WORDS: [Words; 6] = [
    Words { name: "gpt-2", pattern: None, digits: false, composed: false, whole_words: false, bos: false },
    Words { name: "smollm", pattern: None, digits: true, composed: false, whole_words: false, bos: false },
    Words { name: "starcoder", pattern: None, digits: true, composed: false, whole_words: false, bos: false },
    Words {
        name: "llama-bpe",
        pattern: Some(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )),
        digits: false,
        composed: false,
        whole_words: true,
        bos: true,
    },
    Words {
        name: "qwen2",
        pattern: Some(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )),
        digits: false,
        composed: true,
        whole_words: false,
        bos: false,
    },
    Words {
        name: "tekken",
        pattern: Some(concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )),
        digits: false,
        composed: false,
        whole_words: true,
        bos: true,
    },
];

/// The tokenizer without its added tokens and its post processor, and whether it begins a text with BOS.
///
/// # Errors
/// An unknown family; no merges. The message asks for a tokenizer.
pub(super) fn tokenizer(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool)> {
    let file = gguf.path.display();
    let found = gguf.text("tokenizer.ggml.pre")?;
    let Some(words) = WORDS.iter().find(|words| Some(words.name) == found) else {
        let known: Vec<&str> = WORDS.iter().map(|words| words.name).collect();
        bail!(
            "{file}: tokenizer.ggml.pre: expected one of {}, found {}: {GIVE_ONE}",
            known.join(", "),
            found.unwrap_or("nothing")
        )
    };
    let merges = gguf
        .list("tokenizer.ggml.merges", "a list of two tokens each", |value| match value {
            header::Value::Text(text) => text.split_once(' ').map(|(left, right)| [left, right]),
            _ => None,
        })?
        .with_context(|| format!("{file}: tokenizer.ggml.merges is missing: {GIVE_ONE}"))?;
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let cut = match words.pattern {
        Some(pattern) => json!([
            { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
            bytes(false),
        ]),
        None if words.digits => json!([{ "type": "Digits", "individual_digits": true }, bytes(true)]),
        None => json!([bytes(true)]),
    };
    let tokenizer = json!({
        "normalizer": if words.composed { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": cut },
        "decoder": bytes(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": words.whole_words,
            "vocab": vocabulary.ids(),
            "merges": merges,
        },
    });
    Ok((tokenizer, words.bos))
}

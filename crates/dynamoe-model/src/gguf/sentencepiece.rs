//! A tokenizer of SentencePiece's that merges characters (Llama 2, Mistral), as tokenizer.json.
//!
//! SentencePiece joins the two neighbours whose union has the highest score. tokenizer.json has a list of pairs instead,
//! the first ones first. So each piece of the vocabulary stands there as every pair that it can be made of.

use std::cmp::Reverse;
use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::header::{self, Gguf};
use super::vocabulary::{GIVE_ONE, Kind, Vocabulary};

/// SentencePiece's space.
const SPACE: &str = "\u{2581}";

/// The tokenizer without its added tokens and its post processor.
///
/// # Errors
/// Settings that would make other tokens than SentencePiece does; the message asks for a tokenizer.
pub(super) fn tokenizer(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let file = gguf.path.display();
    let scores = gguf
        .list("tokenizer.ggml.scores", "a list of numbers", |value| match value {
            header::Value::Float(score) => Some(*score),
            _ => None,
        })?
        .filter(|scores| scores.len() == vocabulary.tokens.len())
        .with_context(|| format!("{file}: tokenizer.ggml.scores: expected one for each token: {GIVE_ONE}"))?;
    let normalized = gguf.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false)
        || gguf.metadata.contains_key("tokenizer.ggml.precompiled_charsmap");
    ensure!(!normalized, "{file}: the tokenizer rewrites text in a way that is not supported: {GIVE_ONE}");
    // SentencePiece makes unused pieces and takes them apart again; llama.cpp marks gaps in the same way
    let unused = vocabulary.iter().find(|(token, kind)| *kind == Kind::Unused && !token.starts_with("[PAD"));
    ensure!(unused.is_none(), "{file}: the tokenizer has unused pieces, which is not supported: {GIVE_ONE}");
    let unknown = vocabulary.iter().find(|(_, kind)| *kind == Kind::Unknown).map(|(token, _)| token);
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut rewrite = vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE })];
    let mut decode = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        rewrite.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decode.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": rewrite },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": decode },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": vocabulary.kinds.contains(&Kind::Byte),
            "ignore_merges": false,
            "vocab": vocabulary.ids(),
            "merges": merges(vocabulary, &scores),
        },
    }))
}

/// All pairs of pieces whose union is a piece: the union with the highest score first, then longer pieces before shorter ones,
/// then in the order of ids.
fn merges<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Vec<[&'a str; 2]> {
    let pieces = vocabulary.iter().zip(0..).filter(|((_, kind), _)| *kind == Kind::Normal);
    let ids: HashMap<&str, usize> = pieces.map(|((token, _), id)| (token, id)).collect();
    let mut found = Vec::new();
    for (&union, &id) in &ids {
        for (at, _) in union.char_indices().skip(1) {
            let (left, right) = union.split_at(at);
            if let (Some(&first), Some(&second)) = (ids.get(left), ids.get(right)) {
                found.push(([left, right], scores[id], [id, first, second]));
            }
        }
    }
    let longer = |[left, right]: [&str; 2]| Reverse([left.chars().count(), right.chars().count()]);
    found.sort_by(|(pair, score, ids), (other, others, other_ids)| {
        let longer_first = || longer(*pair).cmp(&longer(*other));
        others.total_cmp(score).then_with(longer_first).then_with(|| ids.cmp(other_ids))
    });
    found.into_iter().map(|(pair, _, _)| pair).collect()
}

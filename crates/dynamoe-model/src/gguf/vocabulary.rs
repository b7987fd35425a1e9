//! The tokens of a GGUF file.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::header::{self, Gguf};

/// What to do where a tokenizer cannot be made.
pub(super) const GIVE_ONE: &str = "give the model's tokenizer.json as --tokenizer FILE";

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary, by token id.
pub(super) struct Vocabulary<'a> {
    pub tokens: Vec<&'a str>,
    pub kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    pub fn read(gguf: &'a Gguf) -> Result<Self> {
        let file = gguf.path.display();
        let tokens = gguf
            .list("tokenizer.ggml.tokens", "a list of texts", |value| match value {
                header::Value::Text(text) => Some(text.as_str()),
                _ => None,
            })?
            .with_context(|| format!("{file}: holds no tokens: {GIVE_ONE}"))?;
        let kind = |value: &header::Value| {
            Some(match value {
                header::Value::Whole(1) => Kind::Normal,
                header::Value::Whole(2) => Kind::Unknown,
                header::Value::Whole(3) => Kind::Control,
                header::Value::Whole(4) => Kind::UserDefined,
                header::Value::Whole(5) => Kind::Unused,
                header::Value::Whole(6) => Kind::Byte,
                _ => return None,
            })
        };
        let kinds = gguf
            .list("tokenizer.ggml.token_type", "a list of numbers from 1 to 6", kind)?
            .with_context(|| format!("{file}: tokenizer.ggml.token_type is missing: {GIVE_ONE}"))?;
        ensure!(
            kinds.len() == tokens.len(),
            "{file}: {} tokens and {} token types: the file is broken",
            tokens.len(),
            kinds.len()
        );
        Ok(Self { tokens, kinds })
    }

    /// Tokens with their kinds, in the order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, Kind)> {
        self.tokens.iter().copied().zip(self.kinds.iter().copied())
    }

    /// Ids by token. What the embedding has beyond the vocabulary is left out.
    pub fn ids(&self) -> Map<String, Value> {
        let used = self.iter().enumerate().filter(|(_, (_, kind))| *kind != Kind::Unused);
        used.map(|(id, (token, _))| (token.to_owned(), id.into())).collect()
    }

    /// Tokens that are found in text before anything else.
    pub fn added(&self) -> Vec<Value> {
        let special = |kind| matches!(kind, Kind::Control | Kind::Unknown);
        let added =
            self.iter().enumerate().filter(|(_, (_, kind))| special(*kind) || *kind == Kind::UserDefined);
        added
            .map(|(id, (content, kind))| {
                json!({
                    "id": id, "content": content, "special": special(kind), "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                })
            })
            .collect()
    }
}

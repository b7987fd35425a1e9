//! The model's language: text to tokens and back, outside of the engine's thread.

mod letters;
mod template;
mod think;

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use mistralrs_core::Pipeline;
use tokenizers::Tokenizer;

pub(super) use letters::Letters;
pub(super) use template::{Conversation, Template};
pub(super) use think::{Part, ThinkTags, Thinking, beginning_of};

/// Tokenizer, chat template and limits of a loaded model.
pub struct Language {
    tokenizer: Tokenizer,
    template: Option<Template>,
    /// The text of each token, in bytes: a token may hold a part of a letter.
    texts: Vec<Box<[u8]>>,
    /// Whether a token is special: no part of a text.
    special: Vec<bool>,
    think: Option<ThinkTags>,
    /// Tokens that end an answer.
    pub(super) ends: Vec<u32>,
    /// Tokens that a prompt and its answer may have together.
    pub(crate) context: usize,
}

impl Language {
    /// Reads them from a loaded pipeline. What a training script left in the tokenizer to cut or pad texts is switched
    /// off: a prompt is never cut here.
    ///
    /// # Errors
    /// A pipeline that has no tokenizer.
    pub(super) fn of(pipeline: &dyn Pipeline) -> Result<Self> {
        let mut tokenizer = (*pipeline.tokenizer().context("the model has no tokenizer")?).clone();
        tokenizer.with_truncation(None).map_err(|error| anyhow!(error))?.with_padding(None);
        let metadata = pipeline.get_metadata();
        let env = metadata.tok_env().context("the model's tokenizer has no table of tokens")?;
        let trie = env.tok_trie();
        let tokens = 0..trie.vocab_size() as u32;
        // special tokens are marked by a byte before their names; alone it is the token of that byte
        let marked = |id| Some(trie.token(id).strip_prefix(&[0xff])?).filter(|name| !name.is_empty());
        let texts: Vec<Box<[u8]>> =
            tokens.clone().map(|id| marked(id).unwrap_or(trie.token(id)).into()).collect();
        let mut special: Vec<bool> = tokens.map(|id| marked(id).is_some()).collect();
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(special) = special.get_mut(id as usize) {
                *special = token.special;
            }
        }
        let template = pipeline.get_chat_template().and_then(|template| Template::of(&template));
        let think = ThinkTags::find(&tokenizer, template.as_ref());
        // their text is how an answer is told from its thoughts
        for id in think.iter().flat_map(ThinkTags::single_tokens) {
            special[id as usize] = false;
        }
        Ok(Self {
            tokenizer,
            template,
            texts,
            special,
            think,
            ends: metadata.eos_tok.clone(),
            context: metadata.max_seq_len,
        })
    }

    /// The tokens of a text. Takes time where the text is long.
    ///
    /// # Errors
    /// The tokenizer's.
    pub(crate) fn tokens(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special_tokens).map_err(|error| anyhow!(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A conversation as the model's template writes it; none if the model has no template.
    pub(super) fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    pub(super) fn think_tags(&self) -> Option<&ThinkTags> {
        self.think.as_ref()
    }

    /// Tokens that the model knows.
    pub(super) fn vocabulary(&self) -> usize {
        self.texts.len()
    }

    /// The bytes that a token adds to a text; none for a special token.
    pub(super) fn text(&self, token: u32) -> &[u8] {
        let token = token as usize;
        if self.special.get(token).copied().unwrap_or(true) { &[] } else { &self.texts[token] }
    }

    /// A token's name: its bytes, a special token's too.
    pub(super) fn name(&self, token: u32) -> &[u8] {
        self.texts.get(token as usize).map_or(&[], |text| text)
    }

    /// The text of tokens.
    pub(super) fn text_of(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.text(token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A model's language that many share.
pub(super) type SharedLanguage = Arc<Language>;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A language whose tokens are bytes, and 256, which ends an answer; `<think>` and `</think>` are many tokens.
    pub fn of_bytes() -> SharedLanguage {
        let mut texts: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
        texts.push(Box::from(&b"</s>"[..]));
        let mut special = vec![false; 256];
        special.push(true);
        let tokens = |text: &str| text.bytes().map(u32::from).collect();
        Arc::new(Language {
            tokenizer: Tokenizer::new(tokenizers::models::bpe::BPE::default()),
            template: None,
            texts,
            special,
            think: Some(ThinkTags::of(tokens("<think>"), tokens("</think>"))),
            ends: vec![256],
            context: 512,
        })
    }

    #[test]
    fn special_tokens_have_names_but_no_text() {
        let language = of_bytes();
        assert_eq!((language.text(256), language.name(256)), (&b""[..], &b"</s>"[..]));
        assert_eq!((language.text(0xff), language.text(9999)), (&b"\xff"[..], &b""[..]));
        assert_eq!(language.text_of(&[104, 256, 105]), "hi");
    }
}

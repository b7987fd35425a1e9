//! How the documents of one model begin, go on and end.

use anyhow::{Context, Error, Result, bail, ensure};
use dynamoe_model::ModelConfig;
use dynamoe_model::chat::ChatTemplate;
use serde_json::json;
use tokenizers::Tokenizer;

use super::plan::Plan;
use crate::data::{Framing, Texts};

/// What stands for the words of user and assistant while the template is looked at.
const WORDS: [&str; 2] = ["Placeholder-of-the-question", "Placeholder-of-the-answer"];
/// Tokens that a conversation has at least besides those of the template.
const SPOKEN: usize = 8;
/// Tokens that are looked at for the words that end a question.
const LOOKED_AT: usize = 16;

/// The rules of a model's documents.
pub(super) struct Script<'a> {
    pub tokenizer: &'a Tokenizer,
    pub framing: Framing,
    /// Tokens that end a document.
    ends: Vec<u32>,
    /// Whether the tokenizer has the token of each row of the embedding, which may have more rows.
    known: Vec<bool>,
    /// Of conversations; none if there are none.
    pub turns: Option<Turns>,
    /// Whether every document is a conversation.
    answers_only: bool,
}

/// What the template writes around the words of a conversation.
pub(super) struct Turns {
    /// In front of the question.
    pub before: Vec<u32>,
    question_end: End,
    /// Between question and answer.
    between: Vec<u32>,
}

/// How a question ends.
enum End {
    /// With a token that was made for it.
    Token(u32),
    /// With a word, such as `[/INST]`. What the template writes between question and answer after that word.
    Word(String, Vec<u32>),
}

impl<'a> Script<'a> {
    /// For a model of this configuration.
    ///
    /// # Errors
    /// Where all documents are to be conversations, no chat template, or one that does not let the model write questions or
    /// leaves them no room.
    pub fn new(texts: &'a Texts, config: &ModelConfig, plan: &Plan) -> Result<Self> {
        let (tokenizer, framing) = (&texts.tokenizer, texts.framing());
        let turns = texts.chat().map(|chat| {
            let turns = Turns::of(chat, tokenizer)?;
            let (template, length) = (turns.before.len() + turns.between.len(), plan.sequence_length);
            ensure!(
                template + SPOKEN <= length,
                "the chat template alone takes {template} tokens, and --sequence-length {length} leaves fewer than {SPOKEN}"
            );
            Ok(turns)
        });
        let turns = match turns {
            Some(Err(error)) if !plan.answers_only => {
                tracing::warn!("the model writes no conversations, only plain documents: {error:#}");
                None
            }
            turns => turns.transpose()?,
        };
        ensure!(
            turns.is_some() || !plan.answers_only,
            "--mask-prompt with --data self trains on answers that the model writes, and the model has no chat template to \
             write them by"
        );
        let mut ends = config.eos_token_ids.clone();
        ends.extend([framing.opening, framing.closing]);
        if let Some(Turns { question_end: End::Token(token), .. }) = &turns {
            ends.push(*token);
        }
        let known = (0..config.vocab_size as u32).map(|id| tokenizer.id_to_token(id).is_some()).collect();
        Ok(Self { tokenizer, framing, ends, known, turns, answers_only: plan.answers_only })
    }

    /// The template of document `number`, if it is a conversation: half of all are.
    pub fn turns_of(&self, number: u64) -> Option<&Turns> {
        self.turns.as_ref().filter(|_| self.answers_only || number.is_multiple_of(2))
    }

    /// Whether a token ends a document.
    pub fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Whether the tokenizer has such a token.
    pub fn knows(&self, token: u32) -> bool {
        self.known.get(token as usize) == Some(&true)
    }

    /// The text of tokens, special ones included.
    pub fn text(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(Error::from_boxed)
    }
}

impl Turns {
    fn of(chat: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Self> {
        let [before, between] = around_question(chat)?;
        let tokens = |text: &str| -> Result<Vec<u32>> {
            Ok(tokenizer.encode_fast(text, false).map_err(Error::from_boxed)?.get_ids().to_vec())
        };
        let (between, words) = (tokens(&between)?, between.trim_start());
        let first = *tokens(words)?.first().context("the template ends a question with nothing")?;
        let added = tokenizer.get_added_tokens_decoder();
        let question_end = if added.contains_key(&first) {
            End::Token(first)
        } else {
            let (word, rest) = words.split_once(char::is_whitespace).unwrap_or((words, ""));
            End::Word(word.to_owned(), tokens(rest)?)
        };
        // a model writes a space as part of the word after it
        Ok(Self { before: tokens(before.trim_end_matches(' '))?, question_end, between })
    }

    /// Whether a question ends with this token, and the tokens from there to the answer. `words` are the question's tokens,
    /// this one at their end.
    pub fn after_question(&self, script: &Script<'_>, words: &[u32]) -> Result<Option<&[u32]>> {
        let Some(&last) = words.last() else { return Ok(None) };
        if script.ends(last) {
            return Ok(Some(&self.between));
        }
        Ok(match &self.question_end {
            End::Token(_) => None,
            End::Word(word, rest) => {
                let end = script.text(&words[words.len().saturating_sub(LOOKED_AT)..])?;
                end.contains(word).then_some(rest)
            }
        })
    }
}

/// What a template writes in front of a question, and between question and answer.
fn around_question(chat: &ChatTemplate) -> Result<[String; 2]> {
    let message = |role: &str, words: &str| json!({ "role": role, "content": words });
    let messages = [message("user", WORDS[0]), message("assistant", WORDS[1])];
    let written = chat.render_answers(&messages, 1);
    let (text, answers) = written.context("the chat template cannot write a question and an answer")?;
    let question = text.find(WORDS[0]).map(|start| start..start + WORDS[0].len());
    match (question, &answers[..]) {
        (Some(question), [answer]) if question.end <= answer.start => {
            Ok([text[..question.start].to_owned(), text[question.end..answer.start].to_owned()])
        }
        _ => bail!("the chat template does not write a question as it stands, and an answer after it"),
    }
}

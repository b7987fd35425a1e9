//! The document of a record: a line of a .jsonl file or a row of a .parquet file.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::format::TextFormat;

/// The field of a record that holds the text unless another is named.
pub const TEXT_FIELD: &str = "text";

/// The fields of records without `--field`: the first of these sets that a record has.
const FIELDS: [&[&str]; 3] = [&[TEXT_FIELD], &["prompt", "completion"], &["messages"]];

/// A text, and the parts of it on which the loss is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Its parts that count, in bytes, ascending.
    pub counted: Vec<Range<usize>>,
}

impl Document {
    /// A text that counts as a whole.
    pub fn whole(text: String) -> Self {
        Self::after(0, text)
    }

    /// A text that counts from byte `start` on.
    pub fn after(start: usize, text: String) -> Self {
        Self { counted: std::iter::once(start..text.len()).collect(), text }
    }

    /// Whether all of it counts.
    pub fn counts_whole(&self) -> bool {
        matches!(&self.counted[..], [part] if *part == (0..self.text.len()))
    }

    /// Whether a token that ends at this byte counts.
    pub fn counts(&self, end: usize) -> bool {
        self.counted.iter().any(|part| part.start < end && end <= part.end)
    }

    /// Whether the token after the text counts: it does where the end of the text does.
    pub fn closing_counts(&self) -> bool {
        self.counted.last().is_some_and(|part| part.end == self.text.len())
    }

    /// Without white space at both ends; none if nothing is left.
    pub(super) fn trimmed(self) -> Option<Self> {
        let text = self.text.trim();
        let before = self.text.len() - self.text.trim_start().len();
        let moved = |place: usize| place.saturating_sub(before).min(text.len());
        let counted = self.counted.iter().map(|part| moved(part.start)..moved(part.end)).collect();
        (!text.is_empty()).then(|| Self { text: text.to_owned(), counted })
    }
}

/// The sets of fields to look for.
pub(super) fn fields(format: &TextFormat) -> &'static [&'static [&'static str]] {
    // a text without parts has no prompt to mask
    if format.mask_prompt { &FIELDS[1..] } else { &FIELDS }
}

/// What a record has to have, for messages.
pub(super) fn expected(format: &TextFormat) -> &'static str {
    match format.mask_prompt {
        true => {
            "\"prompt\" and \"completion\", or \"messages\": --mask-prompt needs to know what is the prompt"
        }
        false => "\"text\", or \"prompt\" and \"completion\", or \"messages\"; --field names another one",
    }
}

/// The document of a record: that of the field that is named, else of the first set of [`FIELDS`] that it has. A list of
/// messages is written out by the model's chat template.
pub(super) fn document(record: &Value, format: &TextFormat) -> Result<Document> {
    if let Some(field) = &format.field {
        return string_field(record, field).map(Document::whole);
    }
    let has = |fields: &&[&str]| fields.iter().all(|field| record.get(field).is_some());
    match fields(format).iter().copied().find(has) {
        Some(&[text]) if text == TEXT_FIELD => string_field(record, text).map(Document::whole),
        Some(&[messages]) => conversation(&[], &record[messages], format),
        Some(&[prompt, completion]) if record[prompt].is_array() => {
            conversation(list(&record[prompt])?, &record[completion], format)
        }
        Some(&[prompt, completion]) => {
            let prompt = string_field(record, prompt)?;
            let masked = if format.mask_prompt { prompt.len() } else { 0 };
            Ok(Document::after(masked, prompt + &string_field(record, completion)?))
        }
        _ => bail!("expected a JSON object with the field {}", expected(format)),
    }
}

/// The text under `field` of a JSON object.
pub(crate) fn string_field(object: &Value, field: &str) -> Result<String> {
    match object.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Null) => bail!("the field {field:?} is null: expected a string"),
        Some(_) => bail!("the field {field:?} is not a string"),
        None => bail!("expected a JSON object with the field {field:?}"),
    }
}

fn list(messages: &Value) -> Result<&[Value]> {
    Ok(messages.as_array().context("expected a list of messages")?)
}

/// Messages written out by the model's template: those of a prompt, and those that may hold answers.
fn conversation(prompt: &[Value], messages: &Value, format: &TextFormat) -> Result<Document> {
    let messages = [prompt, list(messages)?].concat();
    ensure!(!messages.is_empty(), "expected messages, found an empty list");
    ensure!(
        messages.iter().all(|message| message.get("role").is_some_and(Value::is_string)),
        "expected messages with a \"role\" and a \"content\""
    );
    let chat = format.chat.as_ref().context(
        "messages are written out by a chat template, and the model has none: give a model that has one, or write the \
         text out yourself",
    )?;
    let cannot = "the model's chat template cannot write these messages";
    if !format.mask_prompt {
        return chat.render(&messages).context(cannot).map(Document::whole);
    }
    let (text, counted) = chat.render_answers(&messages, prompt.len()).context(cannot)?;
    ensure!(
        !counted.is_empty(),
        "expected a message with the role \"assistant\" after the prompt: with --mask-prompt there is nothing to learn \
         without one"
    );
    Ok(Document { text, counted })
}

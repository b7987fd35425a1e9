//! The text of a record: a line of a .jsonl file or a row of a .parquet file.

use anyhow::{Context, Result, bail, ensure};
use dynamoe_model::chat::ChatTemplate;
use serde_json::Value;

/// The field of a record that holds the text unless another is named.
pub const TEXT_FIELD: &str = "text";

/// The fields of records without `--field`: the first of these sets that a record has.
pub(super) const FIELDS: [&[&str]; 3] = [&[TEXT_FIELD], &["prompt", "completion"], &["messages"]];

/// What a record has to have, for messages.
pub(super) const EXPECTED: &str =
    "\"text\", or \"prompt\" and \"completion\", or \"messages\"; --field names another one";

/// The text of a record: that of `field` where one is named, else of the first set of [`FIELDS`] that it has. A list
/// of messages is written out as `chat` writes it.
pub(super) fn text(record: &Value, field: Option<&str>, chat: Option<&ChatTemplate>) -> Result<String> {
    if let Some(field) = field {
        return string_field(record, field);
    }
    let has = |fields: &&[&str]| fields.iter().all(|field| record.get(field).is_some());
    match FIELDS.iter().copied().find(has) {
        Some(&[text]) if text == TEXT_FIELD => string_field(record, text),
        Some(&[messages]) => conversation(&[&record[messages]], chat),
        Some(&[prompt, completion]) if record[prompt].is_array() => {
            conversation(&[&record[prompt], &record[completion]], chat)
        }
        Some(&[prompt, completion]) => Ok(string_field(record, prompt)? + &string_field(record, completion)?),
        _ => bail!("expected a JSON object with the field {EXPECTED}"),
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

/// Messages written out by the model's template.
fn conversation(lists: &[&Value], chat: Option<&ChatTemplate>) -> Result<String> {
    let mut messages = Vec::new();
    for list in lists {
        let list = list.as_array().context("expected a list of messages")?;
        messages.extend(list.iter().cloned());
    }
    ensure!(!messages.is_empty(), "expected messages, found an empty list");
    ensure!(
        messages.iter().all(|message| message.get("role").is_some_and(Value::is_string)),
        "expected messages with a \"role\" and a \"content\""
    );
    let chat = chat.context(
        "messages are written out by a chat template, and the model has none: give a model that has one, or write the \
         text out yourself",
    )?;
    chat.render(&messages).context("the model's chat template cannot write these messages")
}

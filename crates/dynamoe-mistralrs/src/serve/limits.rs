//! What one request may ask for, checked before the engine sees it: everything that a few bytes can multiply.

use serde_json::Value;

use super::error::{ApiError, ApiResult};

/// Limits of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Answers to one prompt (`n`, `best_of`).
    pub choices: u64,
    /// Likeliest tokens told for each position (`top_logprobs`, `logprobs`).
    pub top_logprobs: u64,
    /// Bytes of a prompt or of all messages: tokenizing them takes the engine's time.
    pub prompt_bytes: usize,
}

/// Stop strings of a request.
const STOPS: usize = 16;
/// Tokens with a bias of their own.
const BIASES: usize = 1024;
/// Tools that a request describes.
const TOOLS: usize = 128;
/// Bytes of a grammar, a schema, a stop string or a sequence breaker.
const PATTERN_BYTES: usize = 64 << 10;

impl Limits {
    /// Checks a body.
    ///
    /// # Errors
    /// The first field that asks for more than it may, or for what the model cannot do, by its name.
    pub fn check(&self, body: &Value) -> ApiResult<()> {
        for field in ["n", "best_of"] {
            at_most(body, field, self.choices)?;
        }
        for field in ["top_logprobs", "logprobs"] {
            at_most(body, field, self.top_logprobs)?;
        }
        length(&body["stop"], "stop", STOPS)?;
        length(&body["logit_bias"], "logit_bias", BIASES)?;
        length(&body["tools"], "tools", TOOLS)?;
        length(&body["dry_sequence_breakers"], "dry_sequence_breakers", STOPS)?;
        for field in ["stop", "grammar", "response_format", "dry_sequence_breakers"] {
            bytes(&body[field], field, PATTERN_BYTES)?;
        }
        for field in ["prompt", "messages"] {
            bytes(&body[field], field, self.prompt_bytes)?;
        }
        if body["truncate_sequence"].as_bool() == Some(true) {
            return Err(refused(
                "truncate_sequence",
                "a prompt is never cut here: shorten it, or leave the field out",
            ));
        }
        if !matches!(body["web_search_options"], Value::Null) {
            return Err(refused("web_search_options", "this server opens no addresses for a request"));
        }
        messages(&body["messages"])
    }
}

fn refused(field: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("{field}: {why}"))
}

/// A number that may be absent, and may not exceed `most`.
fn at_most(body: &Value, field: &str, most: u64) -> ApiResult<()> {
    match body[field].as_f64() {
        Some(number) if number > most as f64 => {
            Err(refused(field, format_args!("expected at most {most}, found {}", body[field])))
        }
        _ => Ok(()),
    }
}

fn length(value: &Value, field: &str, most: usize) -> ApiResult<()> {
    let found = value.as_array().map_or_else(|| value.as_object().map_or(0, |map| map.len()), Vec::len);
    if found > most {
        return Err(refused(field, format_args!("expected at most {most} entries, found {found}")));
    }
    Ok(())
}

fn bytes(value: &Value, field: &str, most: usize) -> ApiResult<()> {
    let found = text_bytes(value);
    if found > most {
        return Err(refused(field, format_args!("expected at most {most} bytes of text, found {found}")));
    }
    Ok(())
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 0,
    }
}

/// The models served here read text: parts of another kind are refused before anything is opened or fetched for them.
fn messages(messages: &Value) -> ApiResult<()> {
    let messages = messages.as_array().map(Vec::as_slice).unwrap_or_default();
    let parts = messages.iter().filter_map(|message| message["content"].as_array()).flatten();
    for part in parts {
        let kind = part["type"].as_str().unwrap_or("none");
        let fields = part.as_object().into_iter().flatten().map(|(field, _)| field.as_str());
        let foreign = fields.into_iter().find(|field| !["type", "text"].contains(field));
        if kind != "text" || foreign.is_some() {
            let found = foreign.unwrap_or(kind);
            return Err(refused(
                "messages",
                format_args!(
                    "the model reads text only: expected content parts of type \"text\", found {found:?}"
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIMITS: Limits = Limits { choices: 8, top_logprobs: 20, prompt_bytes: 1000 };

    #[test]
    fn ordinary_requests_pass() {
        for body in [
            json!({"prompt": "x", "n": 8, "best_of": null, "max_tokens": 100_000, "logprobs": 5, "stop": "."}),
            json!({"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 20}),
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stop": [".", "!"]}),
            json!({"prompt": "x", "truncate_sequence": false, "logit_bias": {"0": -100}}),
            json!({}),
        ] {
            LIMITS.check(&body).unwrap();
        }
    }

    #[test]
    fn what_a_few_bytes_can_multiply_is_bounded_by_name() {
        let many = |count: usize| Value::from((0..count).map(|n| n.to_string()).collect::<Vec<_>>());
        let image = |kind: &str| {
            let part = json!({"type": kind, kind: {"url": "http://127.0.0.1/x"}});
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]})
        };
        for (body, word) in [
            (json!({"n": 100_000}), "n: expected at most 8, found 100000"),
            (json!({"n": 1e300}), "n: expected at most 8"),
            (json!({"best_of": 9}), "best_of: "),
            (json!({"top_logprobs": 21}), "top_logprobs: "),
            (json!({"stop": many(17)}), "stop: expected at most 16 entries, found 17"),
            (json!({"stop": "x".repeat(70_000)}), "stop: expected at most 65536 bytes"),
            (json!({"tools": many(129)}), "tools: "),
            (json!({"grammar": {"type": "regex", "value": "x".repeat(70_000)}}), "grammar: "),
            (json!({"prompt": "x".repeat(1001)}), "prompt: expected at most 1000 bytes"),
            (json!({"messages": [{"content": "x".repeat(1001)}]}), "messages: expected at most 1000 bytes"),
            (json!({"truncate_sequence": true}), "truncate_sequence: "),
            (json!({"web_search_options": {}}), "web_search_options: "),
            (image("image_url"), "image_url"),
            (image("audio_url"), "audio_url"),
            (image("video_url"), "video_url"),
            (image("input_audio"), "input_audio"),
            (
                json!({"messages": [{"content": [{"type": "text", "text": "x", "image_url": "y"}]}]}),
                "image_url",
            ),
        ] {
            let error = LIMITS.check(&body).unwrap_err();
            assert!(error.status.is_client_error() && error.message.contains(word), "{word}: {error:?}");
        }
    }
}

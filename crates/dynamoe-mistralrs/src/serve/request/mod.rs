//! What a client may ask for, read field by field: a field that is not honoured is refused by its name.

mod body;
mod content;
mod dial;
mod limits;
mod sampling;
mod tools;

use serde::de::DeserializeOwned;

use super::error::{ApiError, ApiResult};

pub(super) use body::{Body, LogprobsField, Prompt, ResponseFormat};
pub(super) use dial::dial_of;
pub(super) use limits::{Limits, at_most};
pub(super) use sampling::{Rules, rules};
pub(super) use tools::{ToolUse, tool_use};

/// Reads a body; an error names the field.
///
/// # Errors
/// 400: no JSON, a field that is unknown or of another type.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> ApiResult<T> {
    // a list would be read as the fields in their order
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::bad_request("the body is not a request: expected an object, found a list"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let request = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        let error = error.into_inner();
        if error.is_data() && field != "." {
            return refused(&field, plain(&error));
        }
        let kind = if error.is_data() { "a request" } else { "JSON" };
        ApiError::bad_request(format!("the body is not {kind}: {}", plain(&error)))
    })?;
    json.end().map_err(|error| ApiError::bad_request(format!("the body is not JSON: {}", plain(&error))))?;
    Ok(request)
}

/// What is wrong, without the long list of all fields and without the place.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(", expected one of").next().unwrap_or(&text);
    text.split(" at line ").next().unwrap_or(text).to_owned()
}

/// 400 for a field.
pub(super) fn refused(field: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("{field}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &str) -> String {
        parse::<Body>(body.as_bytes()).map(|_| String::new()).unwrap_err().message
    }

    #[test]
    fn an_error_names_the_field() {
        for (body, words) in [
            (r#"{"max_tokens": "many"}"#, ["max_tokens", "many"]),
            (r#"{"max_tokens": -1}"#, ["max_tokens", "-1"]),
            (r#"{"messages": [{"role": "user", "content": 3}]}"#, ["messages[0].content", "3"]),
            (
                r#"{"messages": [{"role": "user", "content": [{"text": 3}]}]}"#,
                ["messages[0].content[0].text", "3"],
            ),
            (r#"{"no_such_field": 1}"#, ["no_such_field", "unknown field"]),
            (r#"{"stream_options": {"include_usages": true}}"#, ["stream_options", "include_usages"]),
            (r#"{"n": 1, "n": 2}"#, ["n", "duplicate field"]),
            ("[]", ["not a request", "list"]),
            ("{", ["not JSON", "EOF"]),
            ("", ["not JSON", "EOF"]),
            ("{} x", ["not JSON", "trailing"]),
            ("null", ["not a request", "null"]),
            (r#"{"messages": 1e999}"#, ["", "out of range"]),
        ] {
            let message = message(body);
            assert!(words.iter().all(|word| message.contains(word)), "{body}: {message}");
            assert!(!message.contains("expected one of"), "{message}");
        }
    }

    #[test]
    fn null_counts_as_absent() {
        let body: Body =
            parse(br#"{"temperature": null, "messages": null, "stop": null, "seed": null}"#).unwrap();
        assert!(body.temperature.is_none() && body.messages.is_none() && body.stop.is_none());
    }
}

//! Errors as OpenAI's API words them: `{"error": {"message": …, "type": …}}`.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// What a client is told instead of an answer.
#[derive(Debug)]
pub(super) struct ApiError {
    pub status: StatusCode,
    pub message: String,
}

pub(super) type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub fn new(status: StatusCode, message: impl ToString) -> Self {
        Self { status, message: message.to_string() }
    }

    /// 400: the client's mistake.
    pub fn bad_request(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 500: ours, or the engine's. Backtraces, which candle writes into its messages where `RUST_BACKTRACE` is set,
    /// are for the log.
    pub fn internal(message: impl ToString) -> Self {
        let message = message.to_string();
        tracing::error!("{message}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, without_backtrace(&message))
    }

    pub fn body(&self) -> Value {
        let kind = if self.status.is_client_error() { "invalid_request_error" } else { "server_error" };
        json!({"error": {"message": self.message, "type": kind, "code": self.status.as_u16()}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS || self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// An error and its causes on one line.
pub(super) fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

/// `message` up to the first frame of a backtrace, a line such as `   0: std::backtrace::Backtrace::create`.
fn without_backtrace(message: &str) -> &str {
    let is_frame = |line: &str| {
        let number = line.trim_start().split_once(": ").map(|(number, _)| number);
        line.starts_with(' ') && number.is_some_and(|n| n.parse::<u32>().is_ok())
    };
    let before: usize = message.split_inclusive('\n').take_while(|line| !is_frame(line)).map(str::len).sum();
    message[..before].trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_no_backtrace() {
        let traced = "no room for 3: tokens\n   0: candle_core::error::Error::bt\n             at ./src/error.rs:264:25\n";
        assert_eq!(ApiError::internal(traced).message, "no room for 3: tokens");
        for whole in ["", "one: line", "1: of 2\n2: of 2", "  indented: 3: more"] {
            assert_eq!(without_backtrace(whole), whole);
        }
    }
}

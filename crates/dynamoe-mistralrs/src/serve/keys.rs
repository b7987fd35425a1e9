//! Secrets that clients present.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, StatusCode,
        header::{AUTHORIZATION, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::error::ApiError;

/// Routes that need no key: the page has to ask for one, and whoever watches over the server sends none.
const OPEN: [&str; 2] = ["/", "/health"];

/// What a client presents as `Authorization: Bearer …`.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// Compares without telling by the time it takes how much is right.
pub(super) fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Who may use the server: whoever presents one of these, or everybody if there is no API key.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys(Arc<[String]>);

impl Keys {
    /// With an API key, the token opens all routes too.
    pub fn new(api_key: Option<String>, token: Option<String>) -> Self {
        Self(api_key.map_or_else(Vec::new, |key| token.into_iter().chain([key]).collect()).into())
    }

    fn open(&self, path: &str, headers: &HeaderMap) -> bool {
        let right = |presented| self.0.iter().any(|key| same(key, presented));
        self.0.is_empty() || OPEN.contains(&path) || bearer(headers).is_some_and(right)
    }
}

/// Lets a request pass that presents a key.
pub(super) async fn guard(State(keys): State<Keys>, request: Request, next: Next) -> Response {
    if keys.open(request.uri().path(), request.headers()) {
        return next.run(request).await;
    }
    let why = "this server asks for its API key, as the header Authorization: Bearer KEY";
    let mut refused = ApiError::new(StatusCode::UNAUTHORIZED, why).into_response();
    refused.headers_mut().insert(WWW_AUTHENTICATE, axum::http::HeaderValue::from_static("Bearer"));
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_key_closes_all_but_the_page_and_health() {
        let presents = |value: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            value.map(|value| headers.insert(AUTHORIZATION, value.parse().unwrap()));
            headers
        };
        let none = Keys::new(None, Some("token".into()));
        assert!(none.open("/v1/completions", &presents(None)));
        let keys = Keys::new(Some("key".into()), Some("token".into()));
        for right in ["Bearer key", "Bearer token"] {
            assert!(keys.open("/v1/completions", &presents(Some(right))), "{right}");
        }
        for wrong in
            [None, Some("Bearer kez"), Some("Bearer key2"), Some("key"), Some("Bearer "), Some("bearer key")]
        {
            assert!(!keys.open("/v1/completions", &presents(wrong)), "{wrong:?}");
            assert!(!keys.open("/metrics", &presents(wrong)) && !keys.open("/no/such", &presents(wrong)));
            assert!(keys.open("/health", &presents(wrong)) && keys.open("/", &presents(wrong)));
        }
    }
}

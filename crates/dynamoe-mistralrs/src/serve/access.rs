//! Who may ask for what: hosts, content types, and paths that do not exist.
//!
//! A web page on another site can make its visitor's browser send requests to this server. Three rules keep it out: no
//! answer carries CORS headers for a site that was not allowed, a body must be declared as JSON (which a page may not do
//! without asking first), and the `Host` header must not be a foreign name (a page can let its own name resolve to this
//! machine).

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode, Uri,
        header::{AUTHORIZATION, CONTENT_TYPE, HOST},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::error::{ApiError, ApiResult};

/// Names that the server answers to, besides `localhost` and every IP address.
#[derive(Debug, Clone)]
pub(super) struct Hosts(Arc<[String]>);

impl Hosts {
    /// These names; `*` allows all.
    pub fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    /// Whether a `Host` header, with or without a port, names this server.
    fn allows(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split_once(']').map_or(rest, |(name, _)| name),
            None => host.split_once(':').map_or(host, |(name, _)| name),
        };
        let name = name.to_ascii_lowercase();
        name == "localhost"
            || name.ends_with(".localhost")
            || name.parse::<std::net::IpAddr>().is_ok()
            || self.0.iter().any(|allowed| *allowed == name || allowed == "*")
    }
}

/// Lets pages of these sites ask, by all routes alike; `*` is any site.
///
/// # Errors
/// What is no origin.
pub(super) fn cors(origins: &[String]) -> anyhow::Result<CorsLayer> {
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(
            origins.iter().map(|origin| read_origin(origin)).collect::<Result<Vec<_>, _>>()?,
        ),
    };
    let methods = [Method::GET, Method::HEAD, Method::POST, Method::PUT];
    Ok(CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods(methods)
        .allow_headers([AUTHORIZATION, CONTENT_TYPE]))
}

fn read_origin(origin: &str) -> anyhow::Result<HeaderValue> {
    let host = origin.strip_prefix("https://").or(origin.strip_prefix("http://")).unwrap_or_default();
    anyhow::ensure!(
        !host.is_empty() && !host.contains('/'),
        "--cors-origin: expected * or an origin such as https://chat.example, found {origin:?}"
    );
    Ok(origin.parse()?)
}

/// Lets a request pass that names this server and declares its body as JSON.
pub(super) async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    match check(&hosts, request.method(), request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check(hosts: &Hosts, method: &Method, uri: &Uri, headers: &HeaderMap) -> ApiResult<()> {
    let header = headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = header.or(uri.authority().map(|authority| authority.as_str()));
    if !host.is_some_and(|host| hosts.allows(host)) {
        let found = host.unwrap_or("none");
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            format!(
                "Host {found:?} is not this server; start it with --allowed-host NAME to answer to that name"
            ),
        ));
    }
    if [Method::POST, Method::PUT, Method::PATCH].contains(method) {
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("expected the header Content-Type: application/json, found {kind:?}"),
            ));
        }
    }
    Ok(())
}

/// The answer to every path that is not served.
pub(super) async fn not_found(uri: Uri) -> ApiError {
    let served = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET and PUT /v1/dynamoe, GET /health, \
                  GET /metrics";
    ApiError::new(StatusCode::NOT_FOUND, format!("{} is not served here; what is: {served}", uri.path()))
}

/// The answer to a path that is served, by another method.
pub(super) async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_localhost_or_a_name_that_was_allowed() {
        let hosts = Hosts::new(&["LLM.example.org".into()]);
        for ours in
            ["127.0.0.1:8080", "10.0.0.7", "[::1]:8080", "[::1]", "localhost:1", "llm.example.org:443"]
        {
            assert!(hosts.allows(ours), "{ours}");
        }
        for foreign in
            ["evil.example", "evil.example:8080", "llm.example.org.evil.example", "", "localhost.evil", "[x]"]
        {
            assert!(!hosts.allows(foreign), "{foreign}");
        }
        assert!(Hosts::new(&["*".into()]).allows("anything.example"));
    }

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        let cors = |origin: &str| cors(&[origin.to_owned()]);
        for right in ["*", "https://chat.example", "http://localhost:3000"] {
            assert!(cors(right).is_ok(), "{right}");
        }
        for wrong in ["chat.example", "https://", "https://chat.example/", "ftp://x", "https://a\n"] {
            assert!(cors(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_body_is_declared_as_json() {
        let status = |method: Method, host: &'static str, kind: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            kind.map(|kind| headers.insert(CONTENT_TYPE, kind.parse().unwrap()));
            check(&Hosts::new(&[]), &method, &Uri::from_static("/v1/completions"), &headers)
                .map_err(|error| error.status.as_u16())
        };
        for json in ["application/json", "Application/JSON; charset=utf-8"] {
            assert_eq!(status(Method::POST, "localhost", Some(json)), Ok(()));
        }
        for other in
            [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("application/jsonx")]
        {
            assert_eq!(status(Method::POST, "localhost", other), Err(415), "{other:?}");
            assert_eq!(status(Method::GET, "localhost", other), Ok(()));
        }
        assert_eq!(status(Method::GET, "evil.example", None), Err(403));
    }
}

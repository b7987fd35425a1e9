//! `GET /`: a small chat page. It needs nothing but this server.

use axum::{
    extract::State,
    http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, X_CONTENT_TYPE_OPTIONS},
    response::{Html, IntoResponse},
};

use super::App;

/// What the page may do: run its own script and style, and ask this server.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /`.
pub(super) async fn show(State(app): State<App>) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 3] =
        [(CONTENT_SECURITY_POLICY, POLICY), (X_CONTENT_TYPE_OPTIONS, "nosniff"), (CACHE_CONTROL, "no-cache")];
    let chats = app.place.language.template().is_some();
    (headers, Html(whole(chats)))
}

/// One document: style and script stand in it, so that no second request is needed. A model that has a chat template is
/// asked by chats unless its user wants otherwise.
fn whole(chats: bool) -> String {
    include_str!("page.html")
        .replace("<!--chat-->", if chats { "checked" } else { "" })
        .replace("/*css*/", include_str!("page.css"))
        .replace("/*js*/", include_str!("page.js"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_no_other_address() {
        let page = whole(true);
        assert!(page.contains("--w8:") && page.contains("\"use strict\""));
        assert!(page.contains("type=\"checkbox\" checked>") && !whole(false).contains("checked>"));
        assert!(!page.contains("/*css*/") && !page.contains("/*js*/"));
        for foreign in ["http://", "https://", "//cdn", "src=", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }
}

//! `GET /v1/models` and `GET /health`.

use std::{ffi::OsStr, path::Path, time::Duration};

use axum::{Json, extract::State, http::StatusCode};
use either::Either;
use mistralrs_core::{Request, TokenizationRequest};
use serde_json::{Value, json};
use tokio::sync::{mpsc::channel, oneshot};

use super::{
    App,
    error::{ApiError, ApiResult},
};

/// How long the engine may take to answer between two steps before it counts as stuck: a step of a long prompt can take
/// seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// `GET /v1/models`: the names of the model, with dials too.
pub(super) async fn list(State(app): State<App>) -> Json<Value> {
    let created = app.place.engine.get_creation_time();
    let object = |id: String| json!({"id": id, "object": "model", "created": created, "owned_by": "local"});
    let data: Vec<Value> = app.names.list().into_iter().map(object).collect();
    Json(json!({"object": "list", "data": data}))
}

/// A hub id as it is, a folder of the hub's cache by the id that it was fetched by, another by its last part.
pub(super) fn name(id: &str) -> String {
    let path = Path::new(id);
    if !path.is_absolute() && !path.is_dir() {
        return id.to_owned();
    }
    let mut parts = path.ancestors().map(|path| path.file_name().and_then(OsStr::to_str));
    let (last, parent, grandparent) = (parts.next(), parts.next(), parts.next());
    match grandparent.flatten().and_then(|folder| folder.strip_prefix("models--")) {
        Some(model) if parent.flatten() == Some("snapshots") => model.replacen("--", "/", 1),
        _ => last.flatten().unwrap_or("model").to_owned(),
    }
}

/// `GET /health`: asks the engine's thread for the tokens of one letter.
pub(super) async fn health(State(app): State<App>) -> ApiResult<Json<Value>> {
    let dead = |why: &str| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("the engine {why}"));
    let engine = app.place.requests.clone();
    let (sender, mut tokens) = channel(1);
    let request = Request::Tokenize(TokenizationRequest {
        text: Either::Right("a".into()),
        tools: None,
        add_generation_prompt: false,
        add_special_tokens: false,
        enable_thinking: None,
        reasoning_effort: None,
        response: sender,
    });
    let (telling, told) = oneshot::channel();
    // outlives who asks: the engine must find somebody who takes its answer
    tokio::spawn(async move {
        let answer = match engine.send(request).await {
            Ok(()) => tokens.recv().await.ok_or("did not answer"),
            Err(_) => Err("has ended"),
        };
        let _ = telling.send(answer);
    });
    match tokio::time::timeout(PATIENCE, told).await {
        Ok(Ok(Ok(Ok(_)))) => Ok(Json(json!({"status": "ok"}))),
        Ok(Ok(Ok(Err(error)))) => Err(dead(&format!("cannot read text: {error}"))),
        Ok(Ok(Err(why))) => Err(dead(why)),
        Ok(Err(_)) => Err(dead("did not answer")),
        Err(_) => Err(dead(&format!("has not answered for {} s", PATIENCE.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_place_is_not_told() {
        let folder = std::env::temp_dir();
        assert!(!name(folder.to_str().unwrap()).contains('/'));
        assert_eq!(name("/no/such/folder"), "folder");
        assert_eq!(name("/cache/hub/models--org--a--name/snapshots/abc"), "org/a--name");
        assert_eq!(name("org/name"), "org/name");
    }
}

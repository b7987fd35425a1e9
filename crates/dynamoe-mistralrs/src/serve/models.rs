//! `GET /v1/models` and `GET /health`.

use std::{path::Path, time::Duration};

use axum::{Json, extract::State, http::StatusCode};
use either::Either;
use mistralrs_core::{Request, TokenizationRequest};
use serde_json::{Value, json};
use tokio::sync::mpsc::channel;

use super::{
    App,
    error::{ApiError, ApiResult},
};

/// How long the engine may take to answer between two steps before it counts as stuck: a step of a long prompt can take
/// seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// `GET /v1/models`: `default`, and the model's name. A folder is named by its last part: where it lies is nobody's matter.
pub(super) async fn list(State(app): State<App>) -> ApiResult<Json<Value>> {
    let models = app.engine.list_models().map_err(ApiError::internal)?;
    let names = models.iter().map(|id| name(id));
    let created = app.engine.get_creation_time();
    let object = |id: &str| json!({"id": id, "object": "model", "created": created, "owned_by": "local"});
    let data: Vec<Value> = std::iter::once("default").chain(names).map(object).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// A hub id as it is, a folder by its last part.
fn name(id: &str) -> &str {
    let path = Path::new(id);
    if path.is_absolute() || path.is_dir() {
        return path.file_name().and_then(|name| name.to_str()).unwrap_or("model");
    }
    id
}

/// `GET /health`: asks the engine's thread for the tokens of one letter.
pub(super) async fn health(State(app): State<App>) -> ApiResult<Json<Value>> {
    let dead = |why: &str| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("the engine {why}"));
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
    let asked = async {
        app.to_engine.send(request).await.map_err(|_| dead("has ended"))?;
        tokens.recv().await.ok_or_else(|| dead("did not answer"))
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(Ok(_))) => Ok(Json(json!({"status": "ok"}))),
        Ok(Ok(Err(error))) => Err(dead(&format!("cannot read text: {error}"))),
        Ok(Err(error)) => Err(error),
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
        assert_eq!(name("org/name"), "org/name");
    }
}

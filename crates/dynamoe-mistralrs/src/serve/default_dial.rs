//! `/v1/dynamoe`: the dial of requests that bring none.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json,
    body::Bytes,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App,
    adaptive::Adaptive,
    error::{ApiError, ApiResult},
    keys::{bearer, same},
    request,
};
use crate::{Dial, LoadedModel, ModelKind};

/// `GET /v1/dynamoe`.
pub(super) async fn show(State(app): State<App>) -> ApiResult<Json<Value>> {
    let model = model(&app)?;
    Ok(Json(describe(&model, app.adaptive)))
}

/// `PUT /v1/dynamoe` with `{"sensitivity": …}` or `{"budget": …}`.
pub(super) async fn set(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> ApiResult<Json<Value>> {
    let proxied = PROXIED.iter().any(|name| headers.contains_key(*name));
    may_set(app.token.as_deref(), bearer(&headers), Peer { address: peer, proxied })?;
    let dial = match request::parse::<Setting>(&body)? {
        Setting { sensitivity: Some(sensitivity), budget: None } => Dial::Sensitivity(sensitivity),
        Setting { sensitivity: None, budget: Some(budget) } => Dial::Budget(budget),
        Setting { sensitivity: Some(_), .. } => {
            return Err(ApiError::bad_request("give sensitivity or budget, not both"));
        }
        Setting { .. } => {
            return Err(ApiError::bad_request(
                "the body must hold sensitivity or budget, a number from 0 to 1",
            ));
        }
    };
    let model = model(&app)?;
    if app.adaptive.is_some() {
        let why = "the default dial follows the load (--adaptive): a request may bring a dial of its own";
        return Err(ApiError::new(StatusCode::CONFLICT, why));
    }
    model.set_dial(dial).map_err(ApiError::bad_request)?;
    tracing::info!("the default dial is {dial:?} now");
    Ok(Json(describe(&model, None)))
}

/// The body of a `PUT`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Setting {
    sensitivity: Option<f64>,
    budget: Option<f64>,
}

fn model(app: &App) -> ApiResult<Arc<LoadedModel>> {
    app.model
        .clone()
        .ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "the model is dense: it has no dial"))
}

/// Headers by which a proxy says for whom it asks.
const PROXIED: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// Where a request comes from.
struct Peer {
    address: SocketAddr,
    /// It came through a proxy, so the address says nothing about who asks.
    proxied: bool,
}

/// With a token, whoever presents it may set the dial; without, whoever is on this machine.
fn may_set(token: Option<&str>, presented: Option<&str>, peer: Peer) -> ApiResult<()> {
    match token {
        Some(token) if presented.is_some_and(|presented| same(presented, token)) => Ok(()),
        Some(_) => {
            Err(ApiError::new(StatusCode::UNAUTHORIZED, "setting the default dial needs the bearer token"))
        }
        None if peer.address.ip().to_canonical().is_loopback() && !peer.proxied => Ok(()),
        None => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "setting the default dial over the network needs a server that was started with --token",
        )),
    }
}

fn describe(model: &LoadedModel, adaptive: Option<Adaptive>) -> Value {
    let (sensitivity, budget) = match model.dial() {
        Dial::Sensitivity(sensitivity) => (Some(sensitivity), None),
        Dial::Budget(budget) => (None, Some(budget)),
    };
    let mean = model.counters().mean_width(model.sizes());
    let mut json = json!({
        "sensitivity": sensitivity,
        "budget": budget,
        "budgets": model.kind().budgets(),
        "adaptive": adaptive.map(Adaptive::describe),
    });
    match model.kind() {
        ModelKind::DynaMoe(config) => {
            json["layer_sensitivities"] = model.sensitivities().as_ref().into();
            json["base_architecture"] = config.base_architecture.as_str().into();
            json["expert_widths"] = model.sizes().into();
            json["mean_ffn_width"] = mean.into();
        }
        ModelKind::Moe(moe) => {
            json["base_architecture"] = moe.experts.architecture.as_str().into();
            json["experts"] = moe.experts.experts.into();
            json["experts_per_token"] = model.full_size().into();
            json["mean_experts"] = mean.map(|share| share * model.full_size() as f64).into();
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_needs_a_token_and_this_machine_only_if_there_is_one() {
        let status = |token, presented, peer: &str| {
            let peer = Peer { address: peer.parse().unwrap(), proxied: false };
            may_set(token, presented, peer).map_err(|error| error.status.as_u16())
        };
        assert_eq!(status(None, None, "127.0.0.1:9"), Ok(()));
        assert_eq!(status(None, None, "[::ffff:127.0.0.1]:9"), Ok(()));
        assert_eq!(status(None, Some("x"), "10.0.0.7:9"), Err(403));
        let proxy = Peer { address: "127.0.0.1:9".parse().unwrap(), proxied: true };
        assert_eq!(may_set(None, None, proxy).unwrap_err().status, StatusCode::FORBIDDEN);
        assert_eq!(status(Some("secret"), Some("secret"), "10.0.0.7:9"), Ok(()));
        for wrong in [None, Some("secreT"), Some("secret "), Some("")] {
            assert_eq!(status(Some("secret"), wrong, "127.0.0.1:9"), Err(401), "{wrong:?}");
        }
    }
}

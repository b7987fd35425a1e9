//! `GET /metrics`: Prometheus text.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError},
};

use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};

use super::App;
use crate::{Dial, LoadedModel};

/// Answers so far, by route and status.
#[derive(Default)]
pub(super) struct Requests(Mutex<BTreeMap<(&'static str, u16), u64>>);

impl Requests {
    /// Counts an answer and passes it on.
    pub fn count(&self, route: &'static str, response: Response) -> Response {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((route, response.status().as_u16())).or_default() += 1;
        drop(counts);
        response
    }
}

/// `GET /metrics`.
pub(super) async fn show(State(app): State<App>) -> impl IntoResponse {
    let mut text = String::new();
    family(&mut text, "dynamoe_requests_total", "counter", "Answered completion requests.");
    for ((route, status), count) in app.requests.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        line(
            &mut text,
            "dynamoe_requests_total",
            &format!("route=\"{route}\",status=\"{status}\""),
            *count as f64,
        );
    }
    if let Some(model) = app.model.as_deref() {
        of_model(&mut text, model);
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

fn of_model(text: &mut String, model: &LoadedModel) {
    let widths = &model.config().expert_widths;
    let layers = model.counters().layers();
    family(text, "dynamoe_ffn_tokens_total", "counter", "Tokens that an expert served, by layer and expert.");
    for (layer, counts) in layers.iter().enumerate() {
        for (expert, (&tokens, width)) in counts.tokens.iter().zip(widths).enumerate() {
            let labels = format!("layer=\"{layer}\",expert=\"{expert}\",width=\"{width}\"");
            line(text, "dynamoe_ffn_tokens_total", &labels, tokens as f64);
        }
    }
    family(text, "dynamoe_router_seconds_total", "counter", "Time spent on choosing experts, by layer.");
    for (layer, counts) in layers.iter().enumerate() {
        let labels = format!("layer=\"{layer}\"");
        line(text, "dynamoe_router_seconds_total", &labels, counts.router.as_secs_f64());
    }
    if let Some(width) = model.counters().mean_width(widths) {
        let help = "Mean FFN width since the model was loaded, as a share of the dense width.";
        family(text, "dynamoe_mean_ffn_width", "gauge", help);
        line(text, "dynamoe_mean_ffn_width", "", width);
    }
    let (name, value) = match model.dial() {
        Dial::Sensitivity(sensitivity) => ("dynamoe_default_sensitivity", sensitivity),
        Dial::Budget(budget) => ("dynamoe_default_budget", budget),
    };
    family(text, name, "gauge", "The dial of requests that bring none.");
    line(text, name, "", value);
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    // writing to a String cannot fail
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: f64) {
    let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let _ = writeln!(text, "{name}{labels} {value}");
}

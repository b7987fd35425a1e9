//! `GET /metrics`: Prometheus text.

use std::{fmt::Write, sync::atomic::Ordering::Relaxed};

use axum::{extract::State, http::header::CONTENT_TYPE, response::IntoResponse};

use crate::{Dial, LoadedModel, ModelKind, locks::lock, serve::App};

/// `GET /metrics`.
pub(in super::super) async fn show(State(app): State<App>) -> impl IntoResponse {
    let mut text = String::new();
    requests(&mut text, &app);
    if let Some(model) = app.model.as_deref() {
        of_model(&mut text, model);
    }
    if let Some(adaptive) = app.adaptive {
        let name = "dynamoe_target_inter_token_latency_seconds";
        family(&mut text, name, "gauge", "What the default budget is set for.");
        line(&mut text, name, "", adaptive.target.as_secs_f64());
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

fn requests(text: &mut String, app: &App) {
    let metrics = &app.metrics;
    let answers = lock(&metrics.answers).clone();
    family(text, "http_requests_total", "counter", "Answers, by method, path and status.");
    for ((method, path, status), count) in &answers {
        let labels = format!("method=\"{method}\",path=\"{path}\",status=\"{status}\"");
        line(text, "http_requests_total", &labels, *count as f64);
    }
    family(text, "dynamoe_requests_total", "counter", "Answered completion requests.");
    for ((_, route, status), count) in
        answers.iter().filter(|((_, path, _), _)| path.ends_with("/completions"))
    {
        let labels = format!("route=\"{route}\",status=\"{status}\"");
        line(text, "dynamoe_requests_total", &labels, *count as f64);
    }
    let counters = [
        (
            "dynamoe_requests_failed_total",
            "Answers that failed after their status was sent.",
            &metrics.failed,
        ),
        (
            "dynamoe_requests_left_total",
            "Requests whose client left before the end of its answer.",
            &metrics.left,
        ),
        ("dynamoe_prompt_tokens_total", "Tokens of answered prompts.", &metrics.prompt_tokens),
        ("dynamoe_answer_tokens_total", "Tokens of answers.", &metrics.answer_tokens),
    ];
    for (name, help, count) in counters {
        family(text, name, "counter", help);
        line(text, name, "", count.load(Relaxed) as f64);
    }
    let name = "mistralrs_time_to_first_token_seconds";
    family(text, name, "histogram", "From a request to the first token of its answer.");
    metrics.first_token.write(text, name);
    let name = "mistralrs_inter_token_latency_seconds";
    family(text, name, "histogram", "From a token to the next of the same answer.");
    metrics.between_tokens.write(text, name);
    let (running, waiting) = app.seats.in_use();
    family(text, "mistralrs_sequences_running", "gauge", "Answers that the engine computes.");
    line(text, "mistralrs_sequences_running", "", running as f64);
    family(text, "mistralrs_sequences_waiting", "gauge", "Answers that wait for others.");
    line(text, "mistralrs_sequences_waiting", "", waiting as f64);
}

fn of_model(text: &mut String, model: &LoadedModel) {
    match model.kind() {
        ModelKind::DynaMoe(_) => of_ffns(text, model),
        ModelKind::Moe(_) => of_experts(text, model),
    }
    let (name, value) = match model.dial() {
        Dial::Sensitivity(sensitivity) => ("dynamoe_default_sensitivity", sensitivity),
        Dial::Budget(budget) => ("dynamoe_default_budget", budget),
    };
    family(text, name, "gauge", "The dial of requests that bring none.");
    line(text, name, "", value);
}

fn of_experts(text: &mut String, model: &LoadedModel) {
    let name = "dynamoe_experts_used_total";
    let help = "Times that a token ran this many experts, over all MoE layers.";
    family(text, name, "counter", help);
    for counts in model.counters().layers() {
        for (&times, experts) in counts.tokens.iter().zip(model.sizes()) {
            line(text, name, &format!("experts=\"{experts}\""), times as f64);
        }
    }
    if let Some(share) = model.counters().mean_width(model.sizes()) {
        let help = "Experts that a token ran on average since the model was loaded.";
        family(text, "dynamoe_mean_experts", "gauge", help);
        line(text, "dynamoe_mean_experts", "", share * model.full_size() as f64);
    }
}

fn of_ffns(text: &mut String, model: &LoadedModel) {
    let widths = model.sizes();
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
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    // writing to a String cannot fail
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: f64) {
    let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let _ = writeln!(text, "{name}{labels} {value}");
}

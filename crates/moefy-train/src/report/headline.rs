//! What the dial saves, in sentences computed from the curves.

use serde::Serialize;

use super::format::{nats, number, percent};
use super::results::{Point, Report, at_width};

/// From this mean width on a point counts as full width.
const FULL: f64 = 0.95;
/// The widths that have their own words.
const NAMED: [(f64, &str); 3] = [
    (0.5, "half the FFN width"),
    (0.25, "a quarter of the FFN width"),
    (0.75, "three quarters of the FFN width"),
];

/// The page's first words.
#[derive(Debug, Serialize)]
pub(super) struct Headline {
    /// The main sentence.
    pub(super) sentence: String,
    /// Sentences that follow it.
    pub(super) details: Vec<String>,
}

/// The sentence and its details.
pub(super) fn headline(report: &Report) -> Headline {
    let points = report.curves.first().map(|c| c.points.as_slice()).unwrap_or_default();
    let Some((width, loss)) = point_to_tell(points) else {
        return Headline { sentence: "No finite loss was measured.".into(), details: vec![] };
    };
    let place = words(width);
    let reference = reference(report, points);
    let sentence = match &reference {
        Some((base, _)) if width < FULL => format!("At {place} {}.", change(loss - base)),
        _ => format!("At {place} the loss is {} nats per token.", nats(loss)),
    };
    let mut details = Vec::new();
    if let Some((base, name)) = reference.filter(|_| width < FULL) {
        details.push(format!("It is {} with {name}, and {} at {place}.", nats(base), nats(loss)));
    }
    details.extend(cost(points, width));
    details.extend(baselines(report, width, loss));
    if let Some(dense) = report.dense_finetuned_loss.filter(|l| l.is_finite()) {
        details.push(format!("The dense model, fine-tuned, reaches {}.", nats(dense)));
    }
    Headline { sentence, details }
}

/// Half the width where the curve covers it, else its measured width nearest to half.
fn point_to_tell(points: &[Point]) -> Option<(f64, f64)> {
    if let Some(loss) = at_width(points, 0.5, |p| p.loss) {
        return Some((0.5, loss));
    }
    points
        .iter()
        .filter(|p| p.mean_width.is_finite() && p.loss.is_finite())
        .min_by(|a, b| (a.mean_width - 0.5).abs().total_cmp(&(b.mean_width - 0.5).abs()))
        .map(|p| (p.mean_width, p.loss))
}

/// What the loss is compared with: the same checkpoint at full width, else a dense model.
fn reference(report: &Report, points: &[Point]) -> Option<(f64, &'static str)> {
    let full = points
        .iter()
        .filter(|p| p.mean_width >= FULL && p.loss.is_finite())
        .max_by(|a, b| a.mean_width.total_cmp(&b.mean_width))
        .map(|p| (p.loss, "the full FFN"));
    full.or(report.dense_finetuned_loss.map(|l| (l, "the dense model fine-tuned")))
        .or(report.dense_loss.map(|l| (l, "the dense model")))
        .filter(|(l, _)| l.is_finite())
}

fn words(width: f64) -> String {
    if width >= 0.995 {
        return "full FFN width".into();
    }
    let named = NAMED.iter().find(|(w, _)| (w - width).abs() < 5e-3);
    named.map_or_else(|| format!("{} of the FFN width", percent(width, 0)), |(_, words)| (*words).into())
}

fn change(delta: f64) -> String {
    let size = number(delta.abs(), 2);
    if delta.abs() < 0.005 {
        "the loss stays the same to within 0.01 nats per token".into()
    } else if delta > 0.0 {
        format!("the loss rises by {size} nats per token")
    } else {
        format!("the loss falls by {size} nats per token")
    }
}

fn cost(points: &[Point], width: f64) -> Option<String> {
    let parameters = at_width(points, width, |p| p.active_parameters).filter(|v| *v > 0.0);
    let flops = at_width(points, width, |p| p.flops).filter(|v| *v > 0.0);
    let (parameters, flops) = (parameters.map(|v| percent(v, 0)), flops.map(|v| percent(v, 0)));
    match (parameters, flops) {
        (Some(p), Some(f)) => Some(format!(
            "A token then uses {p} of the dense model’s parameters and {f} of its floating point operations."
        )),
        (Some(p), None) => Some(format!("A token then uses {p} of the dense model’s parameters.")),
        (None, Some(f)) => {
            Some(format!("A token then costs {f} of the dense model’s floating point operations."))
        }
        (None, None) => None,
    }
}

/// What the baselines reach at the same width, each with its distance.
fn baselines(report: &Report, width: f64, loss: f64) -> Option<String> {
    let mut parts = Vec::new();
    for curve in report.curves.iter().skip(1).take(4) {
        if let Some(other) = at_width(&curve.points, width, |p| p.loss) {
            let delta = other - loss;
            let side = if delta < 0.0 { "lower" } else { "higher" };
            parts.push(format!("{} {} ({} {side})", curve.name, nats(other), number(delta.abs(), 2)));
        }
    }
    (!parts.is_empty()).then(|| format!("At that width: {}.", parts.join(", ")))
}

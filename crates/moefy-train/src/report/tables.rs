//! Tables: every number of the charts, widths per layer, minimal pairs; and the colour scale for widths.

use serde::Serialize;

use super::charts::Styles;
use super::format::{count, dial, nats, number, percent, plus_minus};
use super::results::{PairsPoint, Point, Report};

/// Steps of the colour scale; the style sheet has one class for each.
const LEVELS: usize = 9;

/// Colours for widths from the narrowest seen anywhere in the report to the full width.
pub(super) struct WidthScale {
    low: f64,
}

/// One step of the scale with the widths it stands for.
#[derive(Debug, Serialize)]
pub(super) struct ScaleStep {
    level: usize,
    text: String,
}

impl WidthScale {
    /// The scale that fits `report`.
    pub(super) fn new(report: &Report) -> Self {
        let points = report.curves.first().map(|c| c.points.as_slice()).unwrap_or_default();
        let layers = points.iter().flat_map(|p| &p.width_per_layer);
        let tokens = report.samples.iter().flat_map(|s| &s.tokens);
        let widths = layers.chain(tokens.map(|t| &t.width)).filter(|w| w.is_finite());
        Self { low: widths.fold(0.75, |low: f64, w| low.min(*w)).max(0.0) }
    }

    /// The step of `width`, 0 the narrowest; none if it is not finite.
    pub(super) fn level(&self, width: f64) -> Option<usize> {
        let share = (width - self.low) / (1.0 - self.low);
        share.is_finite().then(|| ((share * LEVELS as f64).max(0.0) as usize).min(LEVELS - 1))
    }

    /// The steps, narrow to wide.
    pub(super) fn legend(&self) -> Vec<ScaleStep> {
        let edge = |i: usize| self.low + (1.0 - self.low) * i as f64 / LEVELS as f64;
        let step = |level| ScaleStep { level, text: percent(edge(level), 0) };
        (0..LEVELS).map(step).collect()
    }
}

/// A row of the table of all measured points.
#[derive(Debug, Serialize)]
pub(super) struct NumberRow {
    style: String,
    name: String,
    dial: String,
    budget: Option<String>,
    width: String,
    loss: String,
    stderr: String,
    perplexity: String,
    parameters: String,
    flops: String,
    tokens: String,
}

/// All points of all curves.
pub(super) fn numbers(report: &Report, styles: &Styles) -> Vec<NumberRow> {
    // A cost that was not measured is left at 0.
    let share = |v: f64| if v > 0.0 { percent(v, 1) } else { "–".into() };
    let row = |name: &str, p: &Point| NumberRow {
        style: format!("s{}", styles.of(name)),
        name: name.to_owned(),
        dial: dial(p.sensitivity),
        budget: p.budget.map(|b| percent(b, 0)),
        width: percent(p.mean_width, 1),
        loss: nats(p.loss),
        stderr: plus_minus(p.stderr, 3),
        perplexity: number(p.loss.exp(), 2),
        parameters: share(p.active_parameters),
        flops: share(p.flops),
        tokens: if p.tokens > 0 { count(p.tokens) } else { "–".into() },
    };
    report.curves.iter().flat_map(|c| c.points.iter().map(move |p| row(&c.name, p))).collect()
}

/// Width of each layer at each dial value.
#[derive(Debug, Serialize)]
pub(super) struct HeatMap {
    layers: usize,
    /// One for each layer: its number, or nothing where there is no room.
    heads: Vec<String>,
    rows: Vec<HeatRow>,
    /// CSS class: how much room a cell has.
    room: &'static str,
}

#[derive(Debug, Serialize)]
struct HeatRow {
    dial: String,
    mean: String,
    cells: Vec<HeatCell>,
}

#[derive(Debug, Serialize)]
struct HeatCell {
    /// Step of the scale, or nothing where no width was measured.
    level: Option<usize>,
    text: String,
}

/// The first curve's widths, largest sensitivity first; none if no point has any.
pub(super) fn heat_map(report: &Report, scale: &WidthScale) -> Option<HeatMap> {
    let mut points: Vec<&Point> = report.curves.first()?.points.iter().collect();
    points.retain(|p| !p.width_per_layer.is_empty());
    points
        .sort_by(|a, b| b.sensitivity.total_cmp(&a.sensitivity).then(b.mean_width.total_cmp(&a.mean_width)));
    let layers = points.iter().map(|p| p.width_per_layer.len()).max()?;
    let every = [1, 2, 5, 10, 20, 50, 100].into_iter().find(|e| layers.div_ceil(*e) <= 12).unwrap_or(1000);
    let cell = |width: Option<&f64>| HeatCell {
        level: width.and_then(|w| scale.level(*w)),
        text: width.filter(|w| w.is_finite()).map_or_else(|| "–".into(), |w| number(w * 100.0, 0)),
    };
    let row = |p: &&Point| HeatRow {
        dial: dial(p.sensitivity),
        mean: percent(p.mean_width, 0),
        cells: (0..layers).map(|l| cell(p.width_per_layer.get(l))).collect(),
    };
    Some(HeatMap {
        layers,
        heads: (0..layers).map(|l| if l % every == 0 { l.to_string() } else { String::new() }).collect(),
        rows: points.iter().map(row).collect(),
        room: if layers <= 8 { "roomy" } else { ["dense", "middling"][usize::from(layers <= 20)] },
    })
}

/// Accuracy on minimal pairs.
#[derive(Debug, Serialize)]
pub(super) struct Pairs {
    fields: Vec<String>,
    rows: Vec<PairsRow>,
}

#[derive(Debug, Serialize)]
struct PairsRow {
    dial: String,
    width: String,
    accuracy: String,
    stderr: String,
    /// Length of the bar, percent: 0 at chance (50%) and below.
    bar: String,
    pairs: String,
    by_field: Vec<String>,
}

/// The table of minimal pairs; none if none were scored.
pub(super) fn pairs(points: &[PairsPoint]) -> Option<Pairs> {
    if points.is_empty() {
        return None;
    }
    let mut fields: Vec<String> = Vec::new();
    for (field, _) in points.iter().flat_map(|p| &p.by_field) {
        if !fields.contains(field) {
            fields.push(field.clone());
        }
    }
    let in_field = |p: &PairsPoint, field: &String| {
        let found = p.by_field.iter().find(|(f, _)| f == field);
        found.map_or_else(|| "–".into(), |(_, accuracy)| percent(*accuracy, 1))
    };
    let row = |p: &PairsPoint| PairsRow {
        dial: dial(p.sensitivity),
        width: percent(p.mean_width, 1),
        accuracy: percent(p.accuracy, 1),
        stderr: plus_minus(p.stderr * 100.0, 1),
        bar: format!(
            "{:.1}",
            if p.accuracy.is_nan() { 0.0 } else { (p.accuracy * 200.0 - 100.0).clamp(0.0, 100.0) }
        ),
        pairs: count(p.pairs),
        by_field: fields.iter().map(|f| in_field(p, f)).collect(),
    };
    let rows = points.iter().map(row).collect();
    Some(Pairs { rows, fields })
}

//! The page's charts: loss against width, and training.

use serde::Serialize;

use super::chart::{Figure, Mark, Reference, Series, Size, Spec};
use super::format::{dial, nats, number, percent, plus_minus, short_count};
use super::results::{Point, Report, TrainMetrics};

const MAIN: (Size, Size) = (
    Size { width: 1040.0, height: 460.0, end_labels: true },
    Size { width: 358.0, height: 330.0, end_labels: false },
);
const HALF: (Size, Size) = (
    Size { width: 500.0, height: 300.0, end_labels: false },
    Size { width: 358.0, height: 270.0, end_labels: false },
);
/// Points of a training curve; more would not be told apart.
const TRAINING_POINTS: usize = 160;
/// Colours of the style sheet.
const STYLES: usize = 7;

/// Colour and marker of each method, the same all over the page.
pub(super) struct Styles(Vec<String>);

/// A line of a legend.
#[derive(Debug, Serialize)]
pub(super) struct LegendEntry {
    pub(super) class: String,
    pub(super) name: String,
    text: String,
}

impl Styles {
    /// Curves first, then methods that only have a training log.
    pub(super) fn new(report: &Report) -> Self {
        let mut names: Vec<String> = Vec::new();
        let trained = report.training.iter().map(|(name, _)| name);
        for name in report.curves.iter().map(|c| &c.name).chain(trained) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        Self(names)
    }

    /// The style of `name`.
    pub(super) fn of(&self, name: &str) -> usize {
        self.0.iter().position(|n| n == name).unwrap_or(0) % STYLES
    }

    /// The curves with their descriptions, and the dense models with their losses.
    pub(super) fn legend(&self, report: &Report) -> Vec<LegendEntry> {
        let mut entries: Vec<LegendEntry> = Vec::new();
        for curve in &report.curves {
            let class = format!("s{}", self.of(&curve.name));
            entries.push(LegendEntry { class, name: curve.name.clone(), text: curve.description.clone() });
        }
        for (name, class, loss) in dense_models(report) {
            let text = format!("Loss {} nats, perplexity {}.", nats(loss), number(loss.exp(), 2));
            entries.push(LegendEntry { class: class.into(), name: name.into(), text });
        }
        entries
    }

    /// The methods that have a training log.
    pub(super) fn training_legend(&self, report: &Report) -> Vec<LegendEntry> {
        let entry = |(name, _): &(String, Vec<TrainMetrics>)| LegendEntry {
            class: format!("s{}", self.of(name)),
            name: name.clone(),
            text: String::new(),
        };
        report.training.iter().filter(|(_, log)| !log.is_empty()).map(entry).collect()
    }
}

fn dense_models(report: &Report) -> Vec<(&'static str, &'static str, f64)> {
    let models = [
        ("dense, fine-tuned", "r0", report.dense_finetuned_loss),
        ("dense, as converted", "r1", report.dense_loss),
    ];
    models.into_iter().filter_map(|(name, class, loss)| Some((name, class, loss?))).collect()
}

/// What the main chart shows over the width.
struct Quantity {
    id: &'static str,
    label: &'static str,
    /// Of a loss, given that of the dense model fine-tuned alike.
    of_loss: fn(f64, f64) -> f64,
    /// Of a loss and its standard error.
    error: fn(f64, f64) -> f64,
}

const LOSS: Quantity = Quantity {
    id: "loss",
    label: "Loss, nats per token",
    of_loss: |loss, _| loss,
    error: |_, stderr| stderr,
};
const PERPLEXITY: Quantity = Quantity {
    id: "perplexity",
    label: "Perplexity",
    of_loss: |loss, _| loss.exp(),
    // The delta method: d exp(l) = exp(l) dl.
    error: |loss, stderr| stderr * loss.exp(),
};
const REGRET: Quantity = Quantity {
    id: "regret",
    label: "Regret: nats above dense fine-tuning",
    of_loss: |loss, dense| loss - dense,
    error: |_, stderr| stderr,
};

/// The main chart in nats, as perplexity, and as regret where the dense model was fine-tuned alike; empty if no
/// curve has a finite point.
pub(super) fn loss_against_width(report: &Report, styles: &Styles) -> Vec<Figure> {
    let regret = report.dense_finetuned_loss.filter(|loss| loss.is_finite()).map(|_| REGRET);
    [LOSS, PERPLEXITY]
        .into_iter()
        .chain(regret)
        .filter_map(|q| width_chart(report, styles, &q).figure(MAIN.0, MAIN.1))
        .collect()
}

/// The main chart in nats, in one size; none if no curve has a finite point.
pub(super) fn loss_figure(report: &Report, styles: &Styles, size: Size) -> Option<Figure> {
    width_chart(report, styles, &LOSS).figure(size, size)
}

fn width_chart(report: &Report, styles: &Styles, q: &Quantity) -> Spec {
    let dense = report.dense_finetuned_loss.unwrap_or(f64::NAN);
    let value = |loss: f64| (q.of_loss)(loss, dense);
    let mark = |p: &Point| Mark {
        x: p.mean_width,
        y: value(p.loss),
        stderr: (q.error)(p.loss, p.stderr),
        tip: point_tip(p),
    };
    let mut series: Vec<Series> = Vec::new();
    for curve in &report.curves {
        let mut marks: Vec<Mark> = curve.points.iter().map(mark).collect();
        marks.sort_by(|a, b| a.x.total_cmp(&b.x));
        series.push(Series { name: curve.name.clone(), style: styles.of(&curve.name), marks });
    }
    let references = dense_models(report);
    let references =
        references.into_iter().map(|(name, class, l)| Reference { name: name.into(), y: value(l), class });
    Spec {
        id: q.id.into(),
        x_label: "Mean FFN width".into(),
        y_label: q.label.into(),
        x_text: |v, _| percent(v, 0),
        y_text: number,
        x_max: Some(1.0),
        y_max: series.first().and_then(upper_end),
        series,
        references: references.collect(),
        markers: true,
    }
}

/// Twice the first curve's height above its top, so that a baseline that fails does not flatten the curve.
fn upper_end(main: &Series) -> Option<f64> {
    let finite = || main.marks.iter().map(|m| m.y).filter(|y| y.is_finite());
    let (low, high) = (finite().reduce(f64::min)?, finite().reduce(f64::max)?);
    (high - low > 0.02 * high.abs()).then_some(high + 2.0 * (high - low))
}

fn point_tip(p: &Point) -> Vec<String> {
    let mut tip = vec![
        format!("loss {}{} nats", nats(p.loss), plus_minus(p.stderr, 3)),
        format!("perplexity {}", number(p.loss.exp(), 2)),
        format!("mean width {}", percent(p.mean_width, 1)),
        format!("sensitivity {}", dial(p.sensitivity)),
    ];
    if let Some(budget) = p.budget {
        tip.push(format!("asked for {}", percent(budget, 0)));
    }
    if p.flops > 0.0 {
        tip.push(format!("FLOPs {} of dense", percent(p.flops, 0)));
    }
    tip
}

/// Loss and mean width over tokens seen, one line per method; empty if nothing was logged.
pub(super) fn training(report: &Report, styles: &Styles) -> Vec<Figure> {
    let loss = training_chart(report, styles, "training-loss", "Training loss, nats", |m| m.loss);
    let width = training_chart(report, styles, "training-width", "Mean FFN width", |m| m.mean_width);
    [loss, width].into_iter().flatten().collect()
}

fn training_chart(
    report: &Report,
    styles: &Styles,
    id: &str,
    y_label: &str,
    value: fn(&TrainMetrics) -> f64,
) -> Option<Figure> {
    let is_width = id.ends_with("width");
    let mut series: Vec<Series> = Vec::new();
    for (name, log) in &report.training {
        let marks = thin(log, value).into_iter().map(|(x, y)| {
            let shown = if is_width { percent(y, 1) } else { format!("{} nats", nats(y)) };
            let what = if is_width { "mean width" } else { "loss" };
            let tip = vec![format!("{what} {shown}"), format!("{} tokens", short_count(x))];
            Mark { x, y, stderr: 0.0, tip }
        });
        series.push(Series { name: name.clone(), style: styles.of(name), marks: marks.collect() });
    }
    Spec {
        id: id.into(),
        x_label: "Tokens seen".into(),
        y_label: y_label.into(),
        x_text: |v, _| short_count(v),
        y_text: if is_width { |v, _| percent(v, 0) } else { number },
        x_max: None,
        y_max: if is_width { Some(1.0) } else { without_spikes(&series) },
        series,
        references: vec![],
        markers: false,
    }
    .figure(HALF.0, HALF.1)
}

/// A little above the 98th percentile: the first steps after conversion may be far off the rest.
fn without_spikes(series: &[Series]) -> Option<f64> {
    let mut all: Vec<f64> =
        series.iter().flat_map(|s| &s.marks).map(|m| m.y).filter(|y| y.is_finite()).collect();
    all.sort_by(f64::total_cmp);
    let (low, high) = (*all.first()?, *all.get(all.len() * 98 / 100)?);
    Some(high + 0.15 * (high - low).max(0.01))
}

/// Means over runs of log lines, so that at most [`TRAINING_POINTS`] remain; a run that holds a non-finite
/// number keeps it, which shows as a gap.
fn thin(log: &[TrainMetrics], value: fn(&TrainMetrics) -> f64) -> Vec<(f64, f64)> {
    let run = log.len().div_ceil(TRAINING_POINTS).max(1);
    let mean = |chunk: &[TrainMetrics]| {
        let n = chunk.len() as f64;
        let x = chunk.iter().map(|m| m.tokens as f64).sum::<f64>() / n;
        (x, chunk.iter().map(value).sum::<f64>() / n)
    };
    log.chunks(run).map(mean).collect()
}

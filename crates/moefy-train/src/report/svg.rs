//! Loss against width as one SVG file, for documents: it loads nothing and follows the reader's light or dark setting.

use anyhow::{Context, Result};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

use super::chart::{Size, marker};
use super::charts::{LegendEntry, Styles, loss_figure};
use super::results::{Curve, Point, Report};

const TEMPLATE: &str = include_str!("curve.svg");
const STYLE: &str = include_str!("curve.css");

/// The drawing without its legend.
const SIZE: Size = Size { width: 868.0, height: 400.0, end_labels: false };
/// Height of a line of the legend, which has two columns.
const LEGEND_LINE: f64 = 22.0;
/// Space around everything.
const MARGIN: f64 = 16.0;

/// Curves as a document keeps them: names and numbers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Points {
    title: String,
    /// Label of the widths; not drawn, for readers of the file.
    #[serde(rename = "x")]
    _x: Option<String>,
    /// Label of the losses; likewise.
    #[serde(rename = "y")]
    _y: Option<String>,
    /// Loss of the dense model, fine-tuned alike.
    dense: Option<f64>,
    curves: Vec<NamedPoints>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedPoints {
    name: String,
    /// Mean width and loss.
    points: Vec<[f64; 2]>,
}

/// Reads curves from JSON: a run's or a comparison's report.json, or
/// `{"title": …, "dense": LOSS, "curves": [{"name": …, "points": [[WIDTH, LOSS], …]}, …]}`.
///
/// # Errors
/// JSON of another form.
pub fn read_curves(json: &[u8]) -> Result<Report> {
    if let Ok(report) = serde_json::from_slice::<Report>(json) {
        return Ok(report);
    }
    let found: Points = serde_json::from_slice(json).context(
        "expected a report.json, or an object with \"title\", \"dense\" and \"curves\", each of a \"name\" and \
         \"points\" [[WIDTH, LOSS], …]",
    )?;
    let point = |[mean_width, loss]: [f64; 2]| Point { mean_width, loss, ..Point::default() };
    let curve = |NamedPoints { name, points }: NamedPoints| {
        Curve::sorted(&name, "", points.into_iter().map(point).collect())
    };
    Ok(Report {
        title: found.title,
        dense_finetuned_loss: found.dense,
        curves: found.curves.into_iter().map(curve).collect(),
        ..Report::default()
    })
}

/// A line of the legend.
#[derive(Debug, Serialize)]
struct Entry {
    class: String,
    name: String,
    marker: Option<String>,
    x: f64,
    y: f64,
}

/// The curves of a report as one SVG.
///
/// # Errors
/// No curve with a finite point.
pub fn curve_svg(report: &Report) -> Result<String> {
    let styles = Styles::new(report);
    let figure = loss_figure(report, &styles, SIZE).context("no curve has a finite point to draw")?;
    let drawing = figure.drawings.first().context("a figure has a drawing")?;
    let entries = styles.legend(report).into_iter().enumerate();
    let legend: Vec<Entry> = entries
        .map(|(number, LegendEntry { class, name, .. })| Entry {
            marker: class.strip_prefix('s').and_then(|style| Some(marker(style.parse().ok()?, 15.0, -4.0))),
            class,
            name,
            x: if number % 2 == 0 { 44.0 } else { 44.0 + SIZE.width / 2.0 },
            y: SIZE.height + 18.0 + LEGEND_LINE * (number / 2) as f64,
        })
        .collect();
    let lines = legend.len().div_ceil(2) as f64;
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_trim_blocks(true);
    env.add_template("curve.svg", TEMPLATE).context("parsing the drawing's template")?;
    let page = context! {
        title => report.title,
        label => figure.label,
        style => Value::from_safe_string(STYLE.trim_end().to_owned()),
        width => SIZE.width + 2.0 * MARGIN,
        height => SIZE.height + LEGEND_LINE * lines + 2.0 * MARGIN,
        d => drawing,
        legend,
    };
    env.get_template("curve.svg")?.render(page).context("rendering the drawing")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = r#"{"title": "a <b> & c", "dense": 1.5, "curves": [
        {"name": "one & two", "points": [[1, 1.6], [0.25, 2.5]]}, {"name": "three", "points": [[0.5, 2.0]]}]}"#;

    #[test]
    fn a_drawing_has_every_curve_and_escapes_names() {
        let report = read_curves(DATA.as_bytes()).unwrap();
        assert_eq!(report.curves[0].points[0].mean_width, 0.25, "points are in the order of widths");
        let svg = curve_svg(&report).unwrap();
        for part in ["a &lt;b&gt; &amp; c", "one &amp; two", "three", "dense, fine-tuned", "class=\"s1\""] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
        assert_eq!(
            svg.matches("class=\"marker\"").count(),
            3 + 2,
            "three points and two entries of the legend"
        );
        assert!(!svg.contains("NaN") && !svg.contains("href"), "{svg}");
    }

    #[test]
    fn the_readmes_picture_is_what_is_drawn_from_its_numbers() {
        let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let data = std::fs::read(docs.join("benchmarks/data/2026-11-24-routing.json")).unwrap();
        let drawn = curve_svg(&read_curves(&data).unwrap()).unwrap();
        let kept = std::fs::read_to_string(docs.join("curve.svg")).unwrap();
        assert!(drawn == kept, "draw it again: moefy-train chart --data FILE --out docs/curve.svg");
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let report = read_curves(DATA.as_bytes()).unwrap();
        let again = read_curves(&serde_json::to_vec(&report).unwrap()).unwrap();
        assert_eq!(curve_svg(&again).unwrap(), curve_svg(&report).unwrap());
    }

    #[test]
    fn other_json_and_empty_curves_are_refused() {
        for (json, word) in
            [("[]", "expected a report.json"), (r#"{"title": "x"}"#, "expected a report.json")]
        {
            assert!(format!("{:#}", read_curves(json.as_bytes()).unwrap_err()).contains(word), "{json}");
        }
        let empty = read_curves(br#"{"title": "x", "curves": []}"#).unwrap();
        assert!(curve_svg(&empty).unwrap_err().to_string().contains("no curve"));
    }
}

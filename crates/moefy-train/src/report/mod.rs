//! One self-contained HTML page from the measurements: [`render`] and [`write()`].
//!
//! Charts are inline SVG laid out here and drawn by the template, so that the page's style sheet colours them
//! (light and dark) and the page reads without scripts. The script adds read-outs and the dial. Everything
//! that comes from outside (titles, names, token texts) goes through the template's HTML escaping.

mod card;
mod chart;
mod charts;
mod format;
mod headline;
pub mod results;
mod samples;
mod svg;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};
use serde_json::json;

use dynamoe_model::checkpoint::write_atomic;

use self::results::Report;

pub use card::{CardOptions, write_card};
pub use svg::{curve_svg, read_curves};

const TEMPLATE: &str = include_str!("report.html");
const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// The report as one HTML page that loads nothing else.
///
/// # Errors
/// When the template does not render, which no measurement should cause: missing parts are left out and
/// non-finite numbers are shown as such.
pub fn render(report: &Report) -> Result<String> {
    let scale = tables::WidthScale::new(report);
    let headline = headline::headline(report);
    let styles = charts::Styles::new(report);
    let loss = charts::loss_against_width(report, &styles);
    let training = charts::training(report, &styles);
    let samples = samples::samples(&report.samples, &scale);

    let mut hover = BTreeMap::new();
    for figure in loss.iter().chain(&training) {
        hover.insert(figure.id.clone(), figure.hover.clone());
    }
    let data = json!({ "charts": hover, "samples": samples.as_ref().map(|s| &s.data) });

    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_template("report.html", TEMPLATE).context("parsing the report's template")?;
    let page = context! {
        title => if report.title.trim().is_empty() { "DynaMoE report" } else { report.title.as_str() },
        facts => report.facts,
        headline,
        legend => styles.legend(report),
        loss,
        training,
        training_legend => styles.training_legend(report),
        table => tables::numbers(report, &styles),
        heat_map => tables::heat_map(report, &scale),
        pairs => tables::pairs(&report.pairs),
        samples,
        scale => scale.legend(),
        style => Value::from_safe_string(STYLE.to_owned()),
        script => Value::from_safe_string(SCRIPT.to_owned()),
        data => Value::from_safe_string(script_json(&data)),
    };
    env.get_template("report.html")?.render(page).context("rendering the report")
}

/// Writes `report.json` and `report.html` into `dir` (made if missing) and returns the page's path.
///
/// Each file is written under a temporary name, synced and renamed, so that a reader never sees half of one.
///
/// # Errors
/// When the page does not render or a file cannot be written; the path is named.
pub fn write(report: &Report, dir: &Path) -> Result<PathBuf> {
    let html = render(report)?;
    let json = serde_json::to_vec_pretty(report).context("serializing the report")?;
    std::fs::create_dir_all(dir).with_context(|| format!("making the folder {}", dir.display()))?;
    write_atomic(&dir.join("report.json"), &json)?;
    let page = dir.join("report.html");
    write_atomic(&page, html.as_bytes())?;
    Ok(page)
}

/// JSON that can stand inside a `<script>` element: nothing in it can close the element or open a comment.
fn script_json(value: &serde_json::Value) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", c as u32)),
            _ => out.push(c),
        }
    }
    out
}

//! A model card: README.md in a checkpoint's folder, with the Hub's metadata and what the dial costs.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use minijinja::{Environment, UndefinedBehavior, context};

use dynamoe_model::Checkpoint;
use dynamoe_model::checkpoint::write_atomic;
use dynamoe_model::files::read_file;

use super::format::{dial, nats, percent, plus_minus};
use super::results::{Point, Report};
use super::{curve_svg, read_curves};

const TEMPLATE: &str = include_str!("card.md");
/// A comment in a card that this program wrote: such a card may be written anew.
const MARKER: &str = "written by moefy-train card";
/// The picture beside the card.
const PICTURE: &str = "curve.svg";
/// Labels of the report's facts that a card repeats.
const FACTS: [&str; 2] = ["Tokens trained", "Held-out tokens"];

/// What a card is made of, besides the checkpoint.
#[derive(Debug, Clone, Default)]
pub struct CardOptions<'a> {
    /// The measurements; none for report.json in the folder, where there is one.
    pub report: Option<&'a Path>,
    /// The Hub's id of the base model; none for the one that the report names.
    pub base_model: Option<&'a str>,
    /// Replace files that this program did not write.
    pub force: bool,
}

/// Writes README.md, and curve.svg where there are measurements, into the folder of a checkpoint.
///
/// # Errors
/// A folder that is no DynaMoE checkpoint, a report that cannot be read, files there that this program did not write. Nothing
/// is written then.
pub fn write_card(dir: &Path, options: &CardOptions) -> Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let report = read_report(dir, options.report)?;
    let picture = report.as_ref().and_then(|report| curve_svg(report).ok());
    let text = card(&checkpoint, report.as_ref(), options.base_model, picture.is_some())?;
    let readme = dir.join("README.md");
    let own = read_file(&readme).is_ok_and(|found| String::from_utf8_lossy(&found).contains(MARKER));
    let files = [(PICTURE, picture.map(String::into_bytes)), ("README.md", Some(text.into_bytes()))];
    for (name, _) in files.iter().filter(|(_, content)| content.is_some()) {
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() && !own && !options.force {
            bail!("{}: exists, and this program did not write it; --force replaces it", path.display());
        }
    }
    for (name, content) in files {
        if let Some(content) = content {
            write_atomic(&dir.join(name), &content)?;
        }
    }
    Ok(())
}

fn read_report(dir: &Path, given: Option<&Path>) -> Result<Option<Report>> {
    let beside = dir.join("report.json");
    let path = match given {
        Some(path) => path,
        None if beside.exists() => &beside,
        None => return Ok(None),
    };
    let place = || path.display().to_string();
    read_curves(&read_file(path).with_context(place)?).with_context(place).map(Some)
}

fn card(
    checkpoint: &Checkpoint,
    report: Option<&Report>,
    base_model: Option<&str>,
    picture: bool,
) -> Result<String> {
    let (dir, config) = (checkpoint.dir(), checkpoint.config());
    let section = config
        .dynamoe
        .as_ref()
        .with_context(|| format!("{}: a dense model; a card tells of a DynaMoE checkpoint", dir.display()))?;
    let base_model = match base_model {
        Some(id) => {
            ensure!(is_hub_id(id), "--base-model: expected the Hub's id of a model, ORG/NAME, found {id:?}");
            Some(id)
        }
        None => report.and_then(named_base),
    };
    let name = std::path::absolute(dir)?;
    let name = name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let facts = report.map(|report| report.facts.as_slice()).unwrap_or_default();
    let facts: Vec<String> = facts
        .iter()
        .filter(|(label, _)| FACTS.contains(&label.as_str()))
        .map(|(label, value)| format!("{label}: {}.", plain(value)))
        .collect();
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_trim_blocks(true);
    environment.set_keep_trailing_newline(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_template("card.md", TEMPLATE).context("parsing the card's template")?;
    let page = context! {
        marker => MARKER,
        name => plain(&name),
        base_model,
        architecture => config.architecture.name().trim_end_matches("ForCausalLM"),
        model_type => config.architecture.model_type(),
        width => config.intermediate_size,
        experts => section.expert_widths,
        rows => report.map(rows).unwrap_or_default(),
        metrics => report.map(metrics).unwrap_or_default(),
        quoted_name => quoted(&name),
        picture => picture.then_some(PICTURE),
        facts,
        budgets => section.budgets.iter().map(|row| dial(row.width)).collect::<Vec<_>>(),
        sensitivity => dial(section.sensitivity),
    };
    environment.get_template("card.md")?.render(page).context("rendering the card")
}

/// The measured points of the model's curve, narrowest first.
fn points(report: &Report) -> Vec<&Point> {
    let Some(curve) = report.curves.first() else { return Vec::new() };
    let finite = |point: &&Point| point.mean_width.is_finite() && point.loss.is_finite();
    curve.points.iter().filter(finite).collect()
}

/// The losses as the Hub's metadata has them: names as YAML's strings, and numbers.
fn metrics(report: &Report) -> Vec<[String; 2]> {
    let metric = |point: &Point| {
        let width = format!("mean width {}", percent(point.mean_width, 1));
        let at =
            point.budget.map_or_else(|| width.clone(), |budget| format!("budget {}, {width}", dial(budget)));
        [quoted(&format!("Loss in nats per token at {at}")), format!("{:.3}", point.loss)]
    };
    points(report).into_iter().map(metric).collect()
}

/// A text in YAML: JSON's strings are some of YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The points as cells.
fn rows(report: &Report) -> Vec<[String; 6]> {
    let points = points(report);
    let Some(widest) = points.last() else { return Vec::new() };
    let row = |point: &&Point| {
        [
            point.budget.map_or_else(|| "–".to_owned(), dial),
            percent(point.mean_width, 1),
            if point.sensitivity > 0.0 { dial(point.sensitivity) } else { "0".to_owned() },
            if point.flops > 0.0 { percent(point.flops, 0) } else { "–".to_owned() },
            format!("{}{}", nats(point.loss), plus_minus(point.stderr, 3)),
            nats(point.loss - widest.loss),
        ]
    };
    points.iter().map(row).collect()
}

/// The base model that a run's report names, if it is the Hub's id of one.
fn named_base(report: &Report) -> Option<&str> {
    let (_, value) = report.facts.iter().find(|(label, _)| label == "Base model")?;
    let name = value.rsplit_once(" (").map_or(value.as_str(), |(name, _)| name);
    (is_hub_id(name) && !Path::new(name).exists()).then_some(name)
}

/// Whether a text is `ORG/NAME`, as the Hub names models.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(known)
    };
    text.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
}

/// A text from outside that makes no Markdown.
fn plain(text: &str) -> String {
    let known = |c: char| if c.is_control() || "<>[]|`*\\".contains(c) { ' ' } else { c };
    text.chars().map(known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_named_where_the_report_knows_its_id() {
        let named = |value: &str| {
            let facts = vec![("Base model".to_owned(), value.to_owned())];
            named_base(&Report { facts, ..Report::default() }).map(str::to_owned)
        };
        assert_eq!(
            named("HuggingFaceTB/SmolLM2-135M (Llama)").as_deref(),
            Some("HuggingFaceTB/SmolLM2-135M")
        );
        for other in
            ["dense (Llama)", "/models/dense (Llama)", "../a/b (Llama)", "a/b/c", "a/b: c", "-a/b", "a/\nb"]
        {
            assert_eq!(named(other), None, "{other}");
        }
    }

    #[test]
    fn names_from_outside_make_no_markdown() {
        assert_eq!(plain("a\n# [b](c)|<i>"), "a #  b (c)  i ");
    }
}

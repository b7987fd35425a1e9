//! Sample texts, token by token, at every dial value.

use serde::Serialize;
use serde_json::json;

use super::format::{dial, nats, percent};
use super::results::{Sample, SampleToken};
use super::tables::WidthScale;

/// From this many tokens on a text scrolls in a box of its own.
const LONG: usize = 500;

/// All that the page's section on texts needs.
#[derive(Debug, Serialize)]
pub(super) struct Samples {
    /// The dial's stops, ascending.
    stops: Vec<String>,
    /// The stop shown first.
    start: usize,
    texts: Vec<Text>,
    /// For the script: widths and losses of every token at every stop.
    #[serde(skip)]
    pub(super) data: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct Text {
    source: String,
    summary: String,
    long: bool,
    tokens: Vec<Token>,
}

/// A token as it is shown.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Token {
    /// Spaces before it, outside its coloured box.
    pub(super) lead: String,
    /// What the box shows.
    pub(super) text: String,
    /// CSS classes.
    pub(super) class: String,
}

/// Groups samples of the same text; none if there is no token at all.
pub(super) fn samples(samples: &[Sample], scale: &WidthScale) -> Option<Samples> {
    let mut groups: Vec<Vec<&Sample>> = Vec::new();
    for sample in samples.iter().filter(|s| !s.tokens.is_empty()) {
        match groups.iter_mut().find(|g| same_text(g[0], sample)) {
            Some(group) => group.push(sample),
            None => groups.push(vec![sample]),
        }
    }
    let mut stops: Vec<f64> = groups.iter().flatten().map(|s| s.sensitivity).collect();
    stops.sort_by(f64::total_cmp);
    stops.dedup();
    let start = start(&stops, groups.first()?);
    let mut texts = Vec::new();
    let mut data = Vec::new();
    for group in &mut groups {
        group.sort_by(|a, b| a.sensitivity.total_cmp(&b.sensitivity));
        let shown = nearest(group, stops[start]);
        let tokens = &group[shown].tokens;
        texts.push(Text {
            source: group[0].source.clone(),
            summary: summary(group[shown]),
            long: tokens.len() > LONG,
            tokens: tokens.iter().map(|t| show(t, scale)).collect(),
        });
        let variants: Vec<_> = group.iter().map(|s| variant(s, scale)).collect();
        // Which variant each stop shows: texts need not have been run at every stop.
        let at: Vec<usize> = stops.iter().map(|s| nearest(group, *s)).collect();
        data.push(json!({ "at": at, "variants": variants }));
    }
    Some(Samples { stops: stops.iter().map(|s| dial(*s)).collect(), start, texts, data: data.into() })
}

fn same_text(a: &Sample, b: &Sample) -> bool {
    a.source == b.source
        && a.sensitivity.total_cmp(&b.sensitivity).is_ne()
        && a.tokens.iter().map(|t| &t.text).eq(b.tokens.iter().map(|t| &t.text))
}

/// The stop whose mean width is nearest to a half in the first text: where widths differ most.
fn start(stops: &[f64], group: &[&Sample]) -> usize {
    let off = |s: &Sample| (mean(s.tokens.iter().map(|t| t.width)).unwrap_or(1.0) - 0.5).abs();
    let best = group.iter().min_by(|a, b| off(a).total_cmp(&off(b)));
    best.and_then(|s| stops.iter().position(|v| v.total_cmp(&s.sensitivity).is_eq())).unwrap_or(0)
}

fn nearest(group: &[&Sample], sensitivity: f64) -> usize {
    let off = |s: &Sample| (s.sensitivity - sensitivity).abs();
    let best = group.iter().enumerate().min_by(|a, b| off(a.1).total_cmp(&off(b.1)));
    best.map_or(0, |(i, _)| i)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.filter(|v| v.is_finite()).fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
    (n > 0).then(|| sum / n as f64)
}

fn summary(sample: &Sample) -> String {
    let width = mean(sample.tokens.iter().map(|t| t.width));
    let loss = mean(sample.tokens.iter().filter_map(|t| t.loss));
    let width = width.map(|w| format!("mean width {}", percent(w, 0)));
    let loss = loss.map(|l| format!("loss {} nats per token", nats(l)));
    let parts = [Some(format!("sensitivity {}", dial(sample.sensitivity))), width, loss];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

fn level(token: &SampleToken, scale: &WidthScale) -> String {
    scale.level(token.width).map_or_else(|| "x".into(), |l| l.to_string())
}

/// One text at one dial value: levels as a string of digits, widths in percent, losses in nats.
fn variant(sample: &Sample, scale: &WidthScale) -> serde_json::Value {
    let tenth = |w: f64| (w * 1000.0).round() / 10.0;
    let whole = |w: &f64| w.is_finite().then(|| (w * 100.0).round() as i64);
    let levels: String = sample.tokens.iter().map(|t| level(t, scale)).collect();
    let widths: Vec<f64> = sample.tokens.iter().map(|t| tenth(t.width)).collect();
    let losses: Vec<Option<String>> = sample.tokens.iter().map(|t| t.loss.map(nats)).collect();
    let layers: Vec<Vec<Option<i64>>> =
        sample.tokens.iter().map(|t| t.width_per_layer.iter().map(whole).collect()).collect();
    json!({ "summary": summary(sample), "levels": levels, "widths": widths, "losses": losses, "layers": layers })
}

/// How a token looks: spaces outside its box, white space and bytes visible, nothing that could reorder or
/// hide other text.
pub(super) fn show(token: &SampleToken, scale: &WidthScale) -> Token {
    let mut kind = "";
    // SentencePiece writes a space as U+2581 and a byte without a character as <0xE2>.
    let mut text = token.text.replace('\u{2581}', " ");
    if let Some(byte) = byte(&text) {
        kind = " byte";
        text = match byte {
            b'\n' => "\n".into(),
            _ => format!("{byte:02X}"),
        };
    }
    let text: String = text.chars().filter(|c| *c != '\r').map(harmless).collect();
    let trimmed = text.trim_start_matches(' ');
    if text.is_empty() {
        kind = " byte";
    } else if text.trim().is_empty() {
        kind = if text.contains('\n') { " newline" } else { " space" };
    } else if text.contains('\u{fffd}') {
        kind = " byte";
    }
    let (lead, text) = if text.is_empty() {
        ("", "∅")
    } else if trimmed.is_empty() {
        ("", text.as_str())
    } else {
        (&text[..text.len() - trimmed.len()], trimmed)
    };
    Token { lead: lead.into(), text: text.into(), class: format!("w{}{kind}", level(token, scale)) }
}

fn byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Control characters, and those that change the direction of the text around them, as U+FFFD.
fn harmless(c: char) -> char {
    match c {
        '\n' | '\t' => c,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

use super::chart::{Axis, spread};
use super::headline::headline;
use super::results::at_width;
use super::results::{Curve, PairsPoint, Point, Sample, SampleToken, TrainMetrics};
use super::samples::show;
use super::tables::WidthScale;
use super::*;

const STORY: &str = "Once upon a time, there was a little fox named Pip. Pip lived under a crooked tree at the \
edge of the forest with her mother and a very old, very sleepy badger.\nOne morning the snow was so deep that \
the door would not open. “We will have to dig,” said her mother. “With what?” asked Pip. The badger opened \
one eye, yawned, and handed her a wooden spoon.\n\nPip dug and dug. She dug past breakfast and past lunch, and \
when the sun was low and pink she popped out of the snow like a carrot. There, in the quiet, stood a heron on \
one leg. “You are late for the concert,” it said.";

/// Repeatable noise in 0..1 from two numbers.
fn noise(a: usize, b: usize) -> f64 {
    let mut x =
        (a as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (b as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 29;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 32;
    (x % 10_000) as f64 / 10_000.0
}

fn point(sensitivity: f64, width: f64, loss: f64, layers: usize) -> Point {
    let layer = |l: usize| {
        let tilt = 0.45 * (l as f64 / layers.max(2) as f64 - 0.5) * (1.0 - width) * 2.0;
        (width + tilt + 0.12 * (1.0 - width) * (noise(l, 3) - 0.5)).clamp(0.25, 1.0)
    };
    Point {
        sensitivity,
        budget: None,
        activation_sparsity: None,
        loss,
        stderr: 0.018 + 0.02 * (1.0 - width),
        perplexity: loss.exp(),
        mean_width: width,
        width_per_layer: (0..layers).map(layer).collect(),
        active_parameters: 0.42 + 0.58 * width,
        flops: 0.36 + 0.645 * width,
        tokens: 131_072,
    }
}

fn curve(name: &str, description: &str, points: &[(f64, f64, f64)], layers: usize) -> Curve {
    let points = points.iter().map(|(s, w, l)| point(*s, *w, *l, layers)).collect();
    Curve { name: name.into(), description: description.into(), points }
}

/// Words and pieces as a subword tokenizer would cut them.
fn tokens(text: &str, sensitivity: f64, layers: usize) -> Vec<SampleToken> {
    let mut pieces: Vec<String> = Vec::new();
    for c in text.chars() {
        let joins = pieces.last().is_some_and(|p: &String| {
            c.is_alphabetic()
                && p.chars().last().is_some_and(|l| l.is_alphabetic() || l == ' ')
                && p.len() < 6
        });
        match pieces.last_mut().filter(|_| joins) {
            Some(last) => last.push(c),
            None => pieces.push(c.to_string()),
        }
    }
    let mut out = Vec::new();
    for (i, text) in pieces.into_iter().enumerate() {
        let hard = noise(i, 1).powi(2) * if text.len() > 3 { 1.2 } else { 0.7 };
        let layer = |l: usize| {
            let score = hard + 0.25 * noise(i, l + 10) + sensitivity * 1.15 - 0.35;
            if sensitivity >= 1.0 { 1.0 } else { ((score * 4.0).ceil() / 4.0).clamp(0.25, 1.0) }
        };
        let width_per_layer: Vec<f64> = (0..layers).map(layer).collect();
        let width = width_per_layer.iter().sum::<f64>() / layers.max(1) as f64;
        let loss = (i > 0).then_some(hard * 5.0 + (1.0 - width) * 0.4);
        out.push(SampleToken { text, width, width_per_layer, loss });
    }
    out
}

fn log(start: f64, end: f64, width: f64, seed: usize) -> Vec<TrainMetrics> {
    let line = |i: usize| {
        let t = i as f64 / 400.0;
        let loss = end + (start - end) * (-6.0 * t).exp() + 0.12 * (noise(i, seed) - 0.5);
        TrainMetrics {
            step: i as u64,
            tokens: i as u64 * 4096,
            loss,
            objective: loss + 0.1,
            mean_width: (width + (1.0 - width) * (-9.0 * t).exp() + 0.1 * (noise(i, seed + 1) - 0.5))
                .min(1.0),
            grad_norm: 0.8,
            lr: 3e-4,
            tokens_per_second: 21_000.0,
        }
    };
    (0..400).map(line).collect()
}

/// A report as a real run gives it.
fn fixture() -> Report {
    let dynamoe = [
        (0.0, 0.25, 2.31),
        (0.1, 0.29, 2.16),
        (0.25, 0.37, 1.95),
        (0.4, 0.48, 1.77),
        (0.5, 0.54, 1.70),
        (0.65, 0.63, 1.64),
        (0.8, 0.74, 1.58),
        (0.9, 0.86, 1.545),
        (1.0, 1.0, 1.52),
    ];
    let nested = [(0.0, 0.25, 2.52), (0.33, 0.5, 2.02), (0.66, 0.75, 1.72), (1.0, 1.0, 1.53)];
    let random = [(0.1, 0.3, 2.71), (0.4, 0.5, 2.35), (0.7, 0.75, 1.94), (1.0, 1.0, 1.53)];
    let oracle = [(0.0, 0.25, 2.2), (0.3, 0.4, 1.74), (0.5, 0.55, 1.6), (0.7, 0.75, 1.53), (1.0, 1.0, 1.515)];
    let dials = [0.0, 0.25, 0.5, 0.8, 1.0];
    let second = "The ship had no name.  It had a number,\tpainted over twice: № 4711. Ça va? 🦊";
    let mut samples = Vec::new();
    for s in dials {
        for (source, text) in [("held-out document 3", STORY), ("held-out document 8", second)] {
            samples.push(Sample { sensitivity: s, source: source.into(), tokens: tokens(text, s, 8) });
        }
    }
    let pairs = [(0.25, 0.37, 0.662), (0.5, 0.54, 0.701), (0.8, 0.74, 0.722), (1.0, 1.0, 0.731)];
    let fields = ["morphology", "semantics", "syntax", "syntax/semantics"];
    let pair = |(s, w, a): &(f64, f64, f64)| PairsPoint {
        sensitivity: *s,
        accuracy: *a,
        stderr: 0.008,
        pairs: 3350,
        mean_width: *w,
        by_field: fields.iter().enumerate().map(|(i, f)| ((*f).into(), a + 0.1 - 0.05 * i as f64)).collect(),
        ..PairsPoint::default()
    };
    Report {
        title: "stories260k-dynamoe".into(),
        facts: [
            ("Base model", "stories260k (Llama, 5 layers, hidden size 64)"),
            ("Training text", "TinyStories, 1.7M tokens"),
            ("Held-out text", "131 072 tokens in 612 documents"),
            ("Expert widths", "256, 512, 768, 1024"),
            ("Router objective", "priced, straight-through"),
            ("Trained", "400 steps in 3 min 41 s on 2 CPU cores, seed 0"),
        ]
        .map(|(a, b)| (a.into(), b.into()))
        .to_vec(),
        curves: vec![
            curve(
                "DynaMoE",
                "Every token’s width is chosen by the routers; the dial sets the price.",
                &dynamoe,
                8,
            ),
            curve("static nested", "All tokens at one width, as MatFormer trains it.", &nested, 8),
            curve("random routing", "The same weights, widths drawn at random.", &random, 8),
            curve("oracle routing", "The best widths found by looking at the answer: a bound.", &oracle, 8),
        ],
        dense_loss: Some(1.62),
        dense_finetuned_loss: Some(1.445),
        training: vec![
            ("DynaMoE".into(), log(3.4, 1.72, 0.6, 7)),
            ("static nested".into(), log(3.6, 1.85, 0.62, 17)),
            ("dense".into(), log(1.62, 1.46, 1.0, 27)),
        ],
        pairs: pairs.iter().map(pair).collect(),
        samples,
    }
}

/// Every element closed, in order; attributes quoted. Enough of a check for a page we write ourselves.
fn assert_balanced(html: &str) {
    const VOID: [&str; 5] = ["meta", "link", "input", "col", "br"];
    let mut open: Vec<String> = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let mut quoted = false;
        let end = rest
            .char_indices()
            .find(|(_, c)| {
                quoted ^= *c == '"';
                *c == '>' && !quoted
            })
            .expect("a tag that does not end")
            .0;
        let tag = &rest[..end];
        assert!(!tag.contains('<'), "< inside the tag {tag:?}");
        rest = &rest[end + 1..];
        if tag.starts_with('!') || tag.ends_with('/') {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "closes the wrong element");
            continue;
        }
        let name = tag.split_whitespace().next().unwrap().to_owned();
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "odd element {name:?}");
        if VOID.contains(&name.as_str()) {
            continue;
        }
        if name == "script" || name == "style" {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).expect("unclosed raw text") + close.len()..];
            continue;
        }
        open.push(name);
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

fn page(report: &Report) -> String {
    let html = render(report).unwrap();
    assert_balanced(&html);
    for number in ["NaN", ">inf<", ">-inf", "\"inf\""] {
        assert!(!html.contains(number), "a raw non-finite number: {number}");
    }
    html
}

fn data(html: &str) -> serde_json::Value {
    let start = html.find("id=\"data\">").unwrap() + "id=\"data\">".len();
    let end = start + html[start..].find("</script>").unwrap();
    serde_json::from_str(&html[start..end]).unwrap()
}

/// Set `REPORT_DIR` to keep the page and look at it.
#[test]
fn writes_the_page_and_the_numbers() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = std::env::var_os("REPORT_DIR").map_or(temporary.path().join("new/folder"), PathBuf::from);
    let report = fixture();
    let path = write(&report, &dir).unwrap();
    assert_eq!(std::fs::read_to_string(path).unwrap(), page(&report));
    let json = std::fs::read(dir.join("report.json")).unwrap();
    let back: Report = serde_json::from_slice(&json).unwrap();
    assert_eq!((&back.title, &back.facts), (&report.title, &report.facts));
    assert_eq!(page(&back), page(&report), "the page can be made again from report.json");
    // Again over what is there, with nothing left behind.
    write(&report, &dir).unwrap();
    let left = std::fs::read_dir(&dir)
        .unwrap()
        .filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().starts_with(".report-"));
    assert_eq!(left.count(), 0);
}

#[test]
fn a_file_in_the_way_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = format!("{:#}", write(&fixture(), &file).unwrap_err());
    assert!(error.contains("file"), "{error}");
}

#[test]
fn the_whole_page_has_all_its_parts_and_loads_nothing() {
    let html = page(&fixture());
    for id in ["curve", "texts", "layers", "training", "pairs", "numbers", "facts"] {
        assert!(html.contains(&format!("<section id=\"{id}\"")), "no section {id}");
    }
    for load in ["http://", "https://", "src=", "@import", "url(http", "fetch(", "<iframe", "<img"] {
        assert!(!html.contains(load), "the page loads something: {load}");
    }
    let data = data(&html);
    let variants = data["samples"][0]["variants"].as_array().unwrap();
    assert_eq!(variants.len(), 5, "one text at five dial values");
    let tokens = variants[0]["widths"].as_array().unwrap().len();
    assert_eq!(variants[0]["levels"].as_str().unwrap().len(), tokens);
    assert_eq!(data["charts"]["loss"].as_array().unwrap().len(), 9 + 4 + 4 + 5);
}

#[test]
fn the_headline_is_computed() {
    let report = fixture();
    // Between (0.48, 1.77) and (0.54, 1.70): 1.7467, against 1.52 at full width.
    let told = headline(&report);
    assert_eq!(told.sentence, "At half the FFN width the loss rises by 0.23 nats per token.");
    assert!(
        told.details.iter().any(|d| d.contains("static nested 2.020 (0.27 higher)")),
        "{:?}",
        told.details
    );
    assert!(
        told.details.iter().any(|d| d.contains("oracle routing 1.647 (0.10 lower)")),
        "{:?}",
        told.details
    );

    let of = |points: &[(f64, f64, f64)], dense| {
        let curves = vec![curve("DynaMoE", "", points, 2)];
        headline(&Report { curves, dense_loss: dense, ..Report::default() }).sentence
    };
    let same = of(&[(0.5, 0.5, 1.5), (1.0, 1.0, 1.501)], None);
    assert!(same.contains("stays the same"), "{same}");
    let falls = of(&[(0.5, 0.5, 1.4), (1.0, 1.0, 1.5)], None);
    assert!(falls.contains("falls by 0.10"), "{falls}");
    let high = of(&[(0.5, 0.62, 1.7), (1.0, 1.0, 1.5)], None);
    assert!(high.starts_with("At 62% of the FFN width the loss rises by 0.20"), "{high}");
    assert_eq!(
        of(&[(0.5, 0.25, 2.0)], None),
        "At a quarter of the FFN width the loss is 2.000 nats per token."
    );
    let dense = of(&[(0.5, 0.25, 2.0)], Some(1.5));
    assert!(dense.contains("rises by 0.50"), "{dense}");
    assert_eq!(of(&[(1.0, 1.0, 1.5)], None), "At full FFN width the loss is 1.500 nats per token.");
    assert_eq!(of(&[(1.0, 0.5, f64::NAN)], Some(1.0)), "No finite loss was measured.");
}

#[test]
fn widths_are_interpolated_only_between_points() {
    let points = [point(0.2, 0.4, 2.0, 1), point(1.0, 0.8, 1.0, 1), point(0.5, 0.6, f64::INFINITY, 1)];
    assert_eq!(at_width(&points, 0.5, |p| p.loss), Some(1.75));
    assert_eq!(at_width(&points, 0.8, |p| p.loss), Some(1.0));
    assert_eq!(at_width(&points, 0.3, |p| p.loss), None);
    assert_eq!(at_width(&points, 0.9, |p| p.loss), None);
    assert_eq!(at_width(&[], 0.5, |p| p.loss), None);
}

#[test]
fn hostile_text_stays_text() {
    let hostile = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} <!-- ";
    let mut report = fixture();
    report.title = hostile.into();
    report.facts.push((hostile.into(), hostile.into()));
    report.curves[0].name = hostile.into();
    report.curves[1].description = hostile.into();
    report.training[0].0 = hostile.into();
    report.pairs[0].by_field[0].0 = hostile.into();
    for sample in &mut report.samples {
        sample.source = hostile.into();
        sample.tokens[1].text = hostile.into();
    }
    let html = page(&report);
    assert_eq!(html.matches("<script").count(), 2, "the page's own two scripts only");
    assert!(!html.contains("<img") && !html.contains("<!--") && !html.contains("> 49"));
    assert!(html.contains("&lt;&#x2f;script&gt;"));
    let name = data(&html)["charts"]["loss"][0][3].as_str().unwrap().to_owned();
    assert_eq!(name, hostile, "the script reads back what was put in");
}

#[test]
fn empty_and_partial_reports_render() {
    let html = page(&Report::default());
    assert!(html.contains("No finite loss was measured.") && !html.contains("<section"));

    let one = Report { curves: fixture().curves[..1].to_vec(), ..Report::default() };
    let html = page(&one);
    assert!(
        html.contains("id=\"curve\"") && !html.contains("id=\"texts\"") && !html.contains("id=\"training\"")
    );

    let mut single = one.clone();
    single.curves[0].points.truncate(1);
    assert!(page(&single).contains("class=\"marker\""));

    let empty = Report {
        training: vec![("DynaMoE".into(), vec![])],
        curves: vec![Curve { name: "DynaMoE".into(), ..Curve::default() }],
        samples: vec![Sample::default()],
        pairs: vec![PairsPoint::default()],
        ..Report::default()
    };
    let html = page(&empty);
    assert!(
        html.contains("id=\"pairs\"") && !html.contains("id=\"training\"") && !html.contains("id=\"texts\"")
    );
}

#[test]
fn non_finite_numbers_leave_gaps_and_are_said() {
    let mut report = fixture();
    report.curves[0].points[3].loss = f64::NAN;
    report.curves[0].points[4].loss = f64::INFINITY;
    report.curves[0].points[5].stderr = f64::NAN;
    report.curves[0].points[6].width_per_layer[2] = f64::NAN;
    report.curves[1].points[0].loss = 900.0;
    report.curves[2].points[0].mean_width = f64::NAN;
    report.dense_loss = Some(f64::NAN);
    report.training[0].1[30].loss = f64::NAN;
    report.pairs[0].accuracy = f64::NAN;
    for sample in &mut report.samples {
        sample.tokens[2].loss = Some(f64::INFINITY);
        sample.tokens[3].width = f64::NAN;
        sample.tokens[3].width_per_layer[0] = f64::NAN;
    }
    let html = page(&report);
    assert!(html.contains("not a number") && html.contains("infinite"));
    assert!(html.contains("1 point lies above this chart"), "900 nats do not flatten the rest");
    assert!(data(&html)["charts"]["loss"].as_array().unwrap().len() == 9 + 4 + 4 + 5 - 4);

    // JSON has no NaN: it is written as null and read back as NaN.
    let dir = tempfile::tempdir().unwrap();
    write(&report, dir.path()).unwrap();
    let json = std::fs::read(dir.path().join("report.json")).unwrap();
    let back: Report = serde_json::from_slice(&json).unwrap();
    assert!(back.curves[0].points[3].loss.is_nan() && back.training[0].1[30].loss.is_nan());
    page(&back);
}

#[test]
fn a_hundred_layers_and_a_long_text_render() {
    let mut report = fixture();
    report.curves[0] = curve("DynaMoE", "", &[(0.2, 0.3, 2.0), (0.6, 0.6, 1.7), (1.0, 1.0, 1.5)], 100);
    report.samples = [0.2, 1.0]
        .map(|s| Sample { sensitivity: s, source: "long".into(), tokens: tokens(&STORY.repeat(8), s, 100) })
        .to_vec();
    let html = page(&report);
    assert!(html.contains("class=\"heat dense\"") && html.contains("class=\"tokens long\""));
    assert_eq!(html.matches("<th scope=\"col\"><span>90</span>").count(), 1);
    if let Some(dir) = std::env::var_os("REPORT_DIR") {
        write(&report, &PathBuf::from(dir).join("hundred")).unwrap();
    }
}

#[test]
fn tokens_are_shown_naturally() {
    let scale = WidthScale::new(&Report::default());
    let shown = |text: &str| {
        let token = SampleToken { text: text.into(), width: 1.0, ..SampleToken::default() };
        let t = show(&token, &scale);
        (t.lead, t.text, t.class)
    };
    let is = |text: &str, lead: &str, body: &str, class: &str| {
        assert_eq!(shown(text), (lead.into(), body.into(), class.into()), "{text:?}");
    };
    is(" fox", " ", "fox", "w8");
    is("\u{2581}fox", " ", "fox", "w8");
    is(" ", "", " ", "w8 space");
    is("\u{2581}\u{2581}", "", "  ", "w8 space");
    is("\n", "", "\n", "w8 newline");
    is("<0x0A>", "", "\n", "w8 newline");
    is("\r\n", "", "\n", "w8 newline");
    is("<0xE2>", "", "E2", "w8 byte");
    is("\u{fffd}", "", "\u{fffd}", "w8 byte");
    is("", "", "∅", "w8 byte");
    is("<0xZZ>", "", "<0xZZ>", "w8");
    is("a\u{202e}b", "", "a\u{fffd}b", "w8 byte");
    is("\0", "", "\u{fffd}", "w8 byte");
}

#[test]
fn texts_run_at_different_stops_share_one_dial() {
    let sample = |s: f64, source: &str, text: &str| Sample {
        sensitivity: s,
        source: source.into(),
        tokens: tokens(text, s, 2),
    };
    let report = Report {
        samples: vec![sample(1.0, "a", "one two"), sample(0.0, "a", "one two"), sample(0.4, "b", "other")],
        ..Report::default()
    };
    let html = page(&report);
    assert!(html.contains("data-stops=\"0|0.4|1\""));
    let data = data(&html);
    assert_eq!(data["samples"][0]["at"], json!([0, 0, 1]));
    assert_eq!(data["samples"][1]["at"], json!([0, 0, 0]));
}

#[test]
fn axes_have_round_ticks_around_all_values() {
    let axis = |v: &[f64], max| Axis::around(v.iter().copied(), max, 5.0);
    let a = axis(&[1.52, 2.71, f64::NAN], None).unwrap();
    assert_eq!((a.low, a.high), (1.5, 2.75));
    assert_eq!(axis(&[0.25, 1.0], Some(1.0)).unwrap().high, 1.0);
    assert!(axis(&[1.0], Some(1.0)).unwrap().low < 1.0);
    assert_eq!(axis(&[f64::NAN, f64::INFINITY], None), None);
    for values in [[0.0, 0.0], [-1e-300, 1e-300], [1e11, -1e11], [5.0, 5.0 + 1e-12]] {
        let a = axis(&values, None).unwrap();
        assert!(a.ticks.len() >= 2 && a.ticks.len() <= 42, "{values:?}: {a:?}");
        assert!(a.low < a.high && values.iter().all(|v| *v >= a.low && *v <= a.high), "{values:?}: {a:?}");
    }
}

#[test]
fn labels_move_apart_within_their_bounds() {
    let places = spread(&[10.0, 11.0, 12.0, 95.0, 99.0], 15.0, 0.0, 100.0);
    assert!(places.windows(2).all(|w| w[1] - w[0] >= 15.0 - 1e-9), "{places:?}");
    assert!(places.iter().all(|p| (0.0..=100.0).contains(p)), "{places:?}");
}

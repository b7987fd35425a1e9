//! Line charts: axes, marks and labels placed in SVG units; the template draws what is laid out here.

use serde::Serialize;

use super::format::shorten;

/// Larger numbers are left out of a chart: their axis would overflow.
const PLOTTABLE: f64 = 1e12;

/// One measured point.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    /// In the x axis' unit.
    pub(super) x: f64,
    /// In the y axis' unit.
    pub(super) y: f64,
    /// Half the height of the error bar.
    pub(super) stderr: f64,
    /// Lines of the read-out.
    pub(super) tip: Vec<String>,
}

/// One line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    /// Index of the colour and the marker.
    pub(super) style: usize,
    /// In the order of the line.
    pub(super) marks: Vec<Mark>,
}

/// A horizontal line across the chart.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) name: String,
    pub(super) y: f64,
    /// CSS class.
    pub(super) class: &'static str,
}

/// A chart before it has a size.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) id: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    pub(super) x_text: fn(f64, usize) -> String,
    pub(super) y_text: fn(f64, usize) -> String,
    /// Upper ends of the axes, whatever the data say.
    pub(super) x_max: Option<f64>,
    pub(super) y_max: Option<f64>,
    pub(super) series: Vec<Series>,
    pub(super) references: Vec<Reference>,
    /// Whether points get a marker.
    pub(super) markers: bool,
}

/// Size of a drawing; a `wide` one has room for labels at the lines' ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) end_labels: bool,
}

/// A chart in two sizes, and the points that a read-out can stop at.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    pub(super) id: String,
    /// For screens at least 900 px wide, and for narrower ones.
    pub(super) drawings: Vec<Drawing>,
    /// Shown to those who hear the page.
    pub(super) label: String,
    /// Points that lie above the chart.
    pub(super) hidden: usize,
    #[serde(skip)]
    pub(super) hover: serde_json::Value,
}

/// A chart laid out for one size.
#[derive(Debug, Serialize)]
pub(super) struct Drawing {
    class: &'static str,
    clip: String,
    width: f64,
    height: f64,
    frame: Frame,
    x_label: String,
    y_label: String,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
    lines: Vec<Line>,
    references: Vec<ReferenceLine>,
    labels: Vec<Label>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Frame {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

#[derive(Debug, Serialize)]
struct Tick {
    at: String,
    text: String,
}

#[derive(Debug, Serialize)]
struct Line {
    style: usize,
    path: String,
    bars: String,
    markers: Vec<Marker>,
}

#[derive(Debug, Serialize)]
struct Marker {
    path: String,
    title: String,
}

#[derive(Debug, Serialize)]
struct ReferenceLine {
    class: &'static str,
    y: String,
}

#[derive(Debug, Serialize)]
struct Label {
    class: String,
    text: String,
    x: String,
    y: String,
    leader: String,
}

/// A linear axis with round ticks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<f64>,
    /// Decimals that tell the ticks apart.
    pub(super) decimals: usize,
}

impl Axis {
    /// The axis around `values` with about `count` steps; none if no value is finite.
    pub(super) fn around(values: impl Iterator<Item = f64>, max: Option<f64>, count: f64) -> Option<Self> {
        let mut range: Option<(f64, f64)> = None;
        for v in values.filter(|v| v.abs() < PLOTTABLE) {
            let (low, high) = range.unwrap_or((v, v));
            range = Some((low.min(v), high.max(v)));
        }
        let (mut low, mut high) = range?;
        if let Some(max) = max {
            high = high.min(max);
            low = low.min(high);
        }
        // The floor keeps a flat line away from steps too fine for f64.
        let least = (high.abs() * 1e-3).max(1e-6);
        if high - low < least {
            let pad = (high.abs() * 0.05).max(0.05);
            (low, high) = (low - pad, if max.is_some_and(|m| high >= m) { high } else { high + pad });
        }
        let rough = (high - low) / count;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|s| s * power >= rough * 0.999).unwrap_or(10.0);
        let quarter = step == 2.5;
        let step = step * power;
        let first = (low / step + 1e-9).floor();
        let last = (high / step - 1e-9).ceil().min(first + 40.0);
        let ticks: Vec<f64> = (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect();
        let decimals = (-step.log10().floor()).max(0.0) as usize + usize::from(quarter);
        Some(Self { low: first * step, high: last * step, ticks, decimals: decimals.min(8) })
    }

    /// Where `value` lies: 0 at the low end, 1 at the high end.
    fn place(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn holds(&self, value: f64) -> bool {
        value.is_finite() && (-1e-9..=1.0 + 1e-9).contains(&self.place(value))
    }
}

impl Spec {
    /// Lays the chart out in two sizes; none if it has no finite point.
    pub(super) fn figure(&self, wide: Size, narrow: Size) -> Option<Figure> {
        let marks =
            || self.series.iter().flat_map(|s| &s.marks).filter(|m| m.x.is_finite() && m.y.is_finite());
        marks().next()?;
        let x = Axis::around(marks().map(|m| m.x), self.x_max, 7.0)?;
        let references = self.references.iter().map(|r| r.y);
        let bars = marks().flat_map(|m| [m.y - bar(m), m.y + bar(m)]);
        let y = Axis::around(bars.chain(references), self.y_max, 7.0)?;
        let drawings = vec![self.draw(&x, &y, wide, "wide", 7.0), self.draw(&x, &y, narrow, "narrow", 4.0)];
        let names: Vec<&str> = self.series.iter().map(|s| s.name.as_str()).collect();
        Some(Figure {
            id: self.id.clone(),
            drawings,
            label: format!("{} against {}: {}", self.y_label, self.x_label, names.join(", ")),
            hidden: marks().filter(|m| !y.holds(m.y)).count(),
            hover: self.hover(&x, &y),
        })
    }

    /// Points as `[x, y, style, name, lines]`, x and y as shares of the frame from its lower left.
    fn hover(&self, x: &Axis, y: &Axis) -> serde_json::Value {
        let round = |v: f64| (v * 1e4).round() / 1e4;
        let mut points = Vec::new();
        for series in &self.series {
            for m in series.marks.iter().filter(|m| x.holds(m.x) && y.holds(m.y)) {
                let (px, py) = (round(x.place(m.x)), round(y.place(m.y)));
                points.push(serde_json::json!([px, py, series.style, series.name, m.tip]));
            }
        }
        points.into()
    }

    fn draw(&self, x: &Axis, y: &Axis, size: Size, class: &'static str, x_labels: f64) -> Drawing {
        let y_texts: Vec<String> = y.ticks.iter().map(|v| (self.y_text)(*v, y.decimals)).collect();
        let longest = y_texts.iter().map(|t| t.chars().count()).max().unwrap_or(0);
        let frame = Frame {
            left: 12.0 + 8.0 * longest as f64,
            top: 34.0,
            right: size.width - if size.end_labels { 178.0 } else { 20.0 },
            bottom: size.height - 50.0,
        };
        let sx = |v: f64| frame.left + x.place(v) * (frame.right - frame.left);
        let sy = |v: f64| frame.bottom - y.place(v) * (frame.bottom - frame.top);
        let every = (x.ticks.len() as f64 / (x_labels + 2.0)).ceil().max(1.0) as usize;
        let x_ticks = x.ticks.iter().step_by(every);
        let x_ticks = x_ticks.map(|v| Tick { at: unit(sx(*v)), text: (self.x_text)(*v, x.decimals) });
        let y_ticks = y.ticks.iter().zip(y_texts).map(|(v, text)| Tick { at: unit(sy(*v)), text });
        let references = self.references.iter().filter(|r| y.holds(r.y));
        Drawing {
            class,
            clip: format!("clip-{}-{class}", self.id),
            width: size.width,
            height: size.height,
            frame,
            x_label: self.x_label.clone(),
            y_label: self.y_label.clone(),
            x_ticks: x_ticks.collect(),
            y_ticks: y_ticks.collect(),
            lines: self.series.iter().map(|s| self.line(s, y, &sx, &sy)).collect(),
            references: references.map(|r| ReferenceLine { class: r.class, y: unit(sy(r.y)) }).collect(),
            labels: if size.end_labels { self.labels(y, frame, &sx, &sy) } else { vec![] },
        }
    }

    fn line(&self, s: &Series, y: &Axis, sx: &dyn Fn(f64) -> f64, sy: &dyn Fn(f64) -> f64) -> Line {
        let mut line = Line { style: s.style, path: String::new(), bars: String::new(), markers: vec![] };
        let mut pen_down = false;
        for m in &s.marks {
            let drawn = m.x.abs() < PLOTTABLE && m.y.abs() < PLOTTABLE;
            if drawn {
                let (px, py) = (sx(m.x), sy(m.y));
                let pen = if pen_down { 'L' } else { 'M' };
                line.path.push_str(&format!("{pen}{px:.1} {py:.1}"));
                if bar(m) > 0.0 {
                    let (top, bottom) = (sy(m.y + bar(m)), sy(m.y - bar(m)));
                    let (l, r) = (px - 3.5, px + 3.5);
                    line.bars.push_str(&format!(
                        "M{px:.1} {top:.1}V{bottom:.1}M{l:.1} {top:.1}H{r:.1}M{l:.1} {bottom:.1}H{r:.1}"
                    ));
                }
                if self.markers && y.holds(m.y) {
                    let title = format!("{}: {}", s.name, m.tip.join(", "));
                    line.markers.push(Marker { path: marker(s.style, px, py), title });
                }
            }
            pen_down = drawn;
        }
        line
    }

    /// Names at the lines' right ends, moved apart until none covers another.
    fn labels(&self, y: &Axis, frame: Frame, sx: &dyn Fn(f64) -> f64, sy: &dyn Fn(f64) -> f64) -> Vec<Label> {
        let mut ends: Vec<(f64, f64, String, &str)> = Vec::new();
        for s in &self.series {
            if let Some(m) = s.marks.iter().rev().find(|m| m.x.is_finite() && y.holds(m.y)) {
                ends.push((sx(m.x), sy(m.y), format!("s{}", s.style), &s.name));
            }
        }
        for r in self.references.iter().filter(|r| y.holds(r.y)) {
            ends.push((frame.right, sy(r.y), r.class.to_owned(), &r.name));
        }
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let wanted: Vec<f64> = ends.iter().map(|e| e.1).collect();
        let places = spread(&wanted, 19.0, frame.top, frame.bottom + 2.0);
        let label = |((px, py, class, name), place): ((f64, f64, String, &str), f64)| Label {
            leader: format!("M{:.1} {py:.1}L{:.1} {place:.1}", px + 7.0, frame.right + 20.0),
            x: unit(frame.right + 25.0),
            y: unit(place + 4.5),
            class,
            text: shorten(name, 20),
        };
        ends.into_iter().zip(places).map(label).collect()
    }
}

fn unit(v: f64) -> String {
    format!("{v:.1}")
}

fn bar(m: &Mark) -> f64 {
    if m.stderr.is_finite() && m.stderr < PLOTTABLE { m.stderr.max(0.0) } else { 0.0 }
}

/// Moves ascending positions apart to at least `gap`, within `low..high` as far as they fit.
pub(super) fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut places = wanted.to_vec();
    let mut floor = low;
    for p in &mut places {
        *p = p.max(floor);
        floor = *p + gap;
    }
    let mut ceiling = high;
    for p in places.iter_mut().rev() {
        *p = p.min(ceiling);
        ceiling = *p - gap;
    }
    places
}

/// A marker that tells lines apart without colour: disc, square, triangle, diamond.
pub(super) fn marker(style: usize, x: f64, y: f64) -> String {
    match style % 4 {
        0 => format!("M{:.1} {y:.1}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", x - 4.5),
        1 => format!("M{:.1} {:.1}h8v8h-8z", x - 4.0, y - 4.0),
        2 => format!("M{x:.1} {:.1}l5 9h-10z", y - 5.5),
        _ => format!("M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z", y - 5.5),
    }
}

//! Solves the dial for mean widths, on calibration text, with few forward passes.
//!
//! One pass tells the mean width at every place of the dial, as far as inputs of layers stay what they were
//! ([`Scores`]). Between two passes, the inputs are taken to change evenly with the width: at a share `s` of the way from
//! the width of one pass to that of the other, the mean width at threshold `θ` is `(1 - s) · width_a(θ) + s · width_b(θ)`.
//! That is exact at both ends. Another pass is made only where the two disagree about the threshold in between.

use anyhow::Result;
use dynamoe::{Budget, Sensitivity};

use super::scored_tokens;
use super::scores::Scores;
use crate::data::{PaddedBatch, subsample};
use crate::progress::Progress;
use crate::ranks::Ranks;
use dynamoe_model::RoutedModel;

/// Widths of the table that a finished run stores.
pub const TABLE: [f64; 14] = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// Tokens of the sample that the dial is solved on. A few rows are then checked on all tokens.
const SAMPLE_TOKENS: usize = 8_192;
/// Rows that are checked.
const CHECKS: usize = 3;
/// A width this close to the one asked for is good enough.
const TOLERANCE: f64 = 0.002;
/// A logit beyond this stands for an end of the dial.
const FAR: f64 = 16.0;
/// Logits closer than this count as one.
const CLOSE: f64 = 1e-3;

/// The sensitivity of a logit: exactly 0 or 1 beyond [`FAR`].
fn sensitivity(logit: f64) -> f64 {
    match logit {
        x if x <= -FAR => 0.0,
        x if x >= FAR => 1.0,
        x => 1.0 / (1.0 + (-x).exp()),
    }
}

/// A map of router logits, `logit → scale · logit + shift`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DialScale {
    /// `scale`
    pub scale: f64,
    /// `shift`
    pub shift: f64,
}

impl DialScale {
    /// The sensitivity that chooses the same experts once the logits are mapped.
    fn map(self, sensitivity: f64) -> f64 {
        let logit = (sensitivity / (1.0 - sensitivity)).ln();
        1.0 / (1.0 + (-(self.scale * logit + self.shift)).exp())
    }

    fn map_row(self, row: Budget) -> Budget {
        let sensitivity = match row.sensitivity {
            Sensitivity::Uniform(s) => Sensitivity::Uniform(self.map(s)),
            Sensitivity::PerLayer(list) => {
                Sensitivity::PerLayer(list.into_iter().map(|s| self.map(s)).collect())
            }
        };
        Budget { sensitivity, ..row }
    }
}

/// A solved dial.
#[derive(Debug, Clone, PartialEq)]
pub struct Solved {
    /// The map of router logits after which sensitivity 0.2 gives a fifth of the way from the narrowest mean width to the
    /// full one, and 0.8 four fifths, where it was asked for and can be had.
    pub scale: Option<DialScale>,
    /// The rows of the checkpoint's table, ascending; for mapped logits if there is a map.
    pub table: Vec<Budget>,
}

/// Solves the dial of `model` for mean `widths` on text: on a sample of it, and a few widths are then checked on all of it.
///
/// # Errors
/// No tokens to measure on; a width outside 0 to 1.
pub fn solve(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    widths: &[f64],
    rescale: bool,
    ranks: &dyn Ranks,
) -> Result<Solved> {
    let progress = Progress::new("solving the dial", "budgets", widths.len() as u64, 0);
    let layers = model.config().num_hidden_layers;
    let sample = subsample(batches, SAMPLE_TOKENS);
    let measure = |sensitivity: &[f64]| Scores::measure(model, &sample, sensitivity, ranks);
    let mut solver = Solver::new(layers, measure)?;
    let scale = if rescale { solver.dial_scale()? } else { None };
    let mut table = solver.table(widths, &Drift::default(), &progress)?;
    if scored_tokens(&sample) < scored_tokens(batches) {
        let all = |s: f64| Ok(Scores::measure(model, batches, &vec![s; layers], ranks)?.width);
        let drift = Drift::measure(&table, solver.known[0].width, all)?;
        table = solver.table(widths, &drift, &Progress::hidden())?;
    }
    progress.finish();
    if let Some(scale) = scale {
        table = table.into_iter().map(|row| scale.map_row(row)).collect();
    }
    Ok(Solved { scale, table })
}

/// By how much all tokens come out wider than the sample, along the width.
#[derive(Debug, Default)]
struct Drift {
    /// `(width, difference)`, ascending in width.
    places: Vec<(f64, f64)>,
}

impl Drift {
    /// Measures the mean width of `all` tokens at a few rows of a table. At both ends of the dial there is no difference.
    fn measure(table: &[Budget], narrowest: f64, all: impl Fn(f64) -> Result<f64>) -> Result<Self> {
        let mut places = vec![(narrowest, 0.0)];
        let rows = table.iter().filter_map(|row| match row.sensitivity {
            Sensitivity::Uniform(s) if s > 0.0 && s < 1.0 => Some((row.width, s)),
            _ => None,
        });
        let rows: Vec<(f64, f64)> = rows.collect();
        let step = rows.len().div_ceil(CHECKS).max(1);
        for &(width, sensitivity) in rows.iter().skip(step / 2).step_by(step) {
            places.push((width, all(sensitivity)? - width));
        }
        places.push((1.0, 0.0));
        Ok(Self { places })
    }

    /// Linear between the places, 0 beyond them.
    fn at(&self, width: f64) -> f64 {
        let between = self.places.windows(2).find_map(|pair| match *pair {
            [(low, from), (high, to)] if (low..high).contains(&width) => {
                Some(from + (width - low) / (high - low) * (to - from))
            }
            _ => None,
        });
        between.unwrap_or(0.0)
    }
}

/// A place on the dial and what was measured there.
#[derive(Debug, Clone)]
struct Measured {
    /// The logit of the sensitivity (see [`dynamoe::router::logit`]).
    logit: f64,
    /// The mean width; never descending along the dial.
    width: f64,
    scores: Scores,
}

impl Measured {
    fn place(&self) -> Place {
        Place { logit: self.logit, width: self.width }
    }
}

/// The widths to expect between two measurements.
struct Between<'a> {
    low: &'a Measured,
    high: &'a Measured,
    /// Which share of the way the width asked for is.
    share: f64,
}

impl Between<'_> {
    fn width_at(&self, logit: f64) -> f64 {
        (1.0 - self.share) * self.low.scores.width_at(logit) + self.share * self.high.scores.width_at(logit)
    }

    /// The lowest logit, to within [`CLOSE`], that reaches `width`.
    fn logit(&self, width: f64) -> f64 {
        let (mut low, mut high) = (self.low.logit, self.high.logit);
        while high - low > CLOSE / 2.0 {
            let middle = f64::midpoint(low, high);
            if self.width_at(middle) < width { low = middle } else { high = middle }
        }
        high
    }

    /// How far the width at `logit` may be from what is expected: half of what the inputs of both ends differ by, weighted
    /// as the error of a linear interpolation is.
    fn doubt(&self, logit: f64) -> f64 {
        let difference = self.high.scores.width_at(logit) - self.low.scores.width_at(logit);
        0.5 * self.share * (1.0 - self.share) * difference.abs()
    }
}

/// A logit, and the mean width that it gives.
#[derive(Clone, Copy)]
struct Place {
    logit: f64,
    width: f64,
}

/// Two neighbouring logits around a width.
struct Bracket {
    low: Place,
    high: Place,
}

impl Bracket {
    /// The end that is closer to `width`.
    fn nearest(&self, width: f64) -> Place {
        let distance = |place: Place| (place.width - width).abs();
        if distance(self.low) < distance(self.high) { self.low } else { self.high }
    }
}

/// Solves a model's dial. It searches over logits, since all scores of a router may be close to one end of the dial. What
/// it measured for one width it uses for the next.
struct Solver<F> {
    /// What one sensitivity for each layer gives.
    measure: F,
    layers: usize,
    /// Ascending in both.
    known: Vec<Measured>,
}

impl<F: Fn(&[f64]) -> Result<Scores>> Solver<F> {
    /// # Errors
    /// Those of `measure`.
    fn new(layers: usize, measure: F) -> Result<Self> {
        let end = |logit: f64| -> Result<Measured> {
            let scores = measure(&vec![sensitivity(logit); layers])?;
            Ok(Measured { logit, width: scores.width, scores })
        };
        let known = vec![end(-FAR)?, end(FAR)?];
        Ok(Self { measure, layers, known })
    }

    /// The sensitivity whose mean width comes closest to `width`, and that mean width.
    ///
    /// One sensitivity for all layers may jump over the width: with a static router, or with routers that give few
    /// different scores. Then the first layers take the value above the jump and the others the value below.
    ///
    /// # Errors
    /// A width outside 0 to 1.
    fn solve(&mut self, width: f64) -> Result<(Sensitivity, f64)> {
        let bracket = self.bracket(width)?;
        let nearest = bracket.nearest(width);
        if (nearest.width - width).abs() <= TOLERANCE || width < bracket.low.width {
            return Ok((Sensitivity::Uniform(sensitivity(nearest.logit)), nearest.width));
        }
        self.split(&bracket, width)
    }

    /// The logit at which the mean width is `width`, if some sensitivity comes close to it.
    fn logit(&mut self, width: f64) -> Result<Option<f64>> {
        let Place { logit, width: found } = self.bracket(width)?.nearest(width);
        Ok(((found - width).abs() <= TOLERANCE && logit.abs() < FAR).then_some(logit))
    }

    /// Two neighbouring logits around `width`. One of them gives it to within [`TOLERANCE`] if that is possible.
    fn bracket(&mut self, width: f64) -> Result<Bracket> {
        dynamoe::dial::check_dial("budget", width)?;
        let mut passes = 0;
        loop {
            let above = self.known.partition_point(|known| known.width < width).min(self.known.len() - 1);
            let (low, high) = (&self.known[above.saturating_sub(1)], &self.known[above]);
            if above == 0 || width >= high.width || high.logit - low.logit < CLOSE {
                return Ok(Bracket { low: low.place(), high: high.place() });
            }
            let share = (width - low.width) / (high.width - low.width);
            let between = Between { low, high, share };
            let logit = between.logit(width);
            // on both sides of a jump, if there is one
            let sides = [logit - CLOSE, logit];
            if sides.iter().all(|&logit| between.doubt(logit) <= TOLERANCE / 2.0) {
                let [low, high] = sides.map(|logit| Place { logit, width: between.width_at(logit) });
                return Ok(Bracket { low, high });
            }
            // not too close to an end, so that the bracket shrinks; and halves, where expectations fail again and again
            let margin = if passes < 4 { 0.02 } else { 0.4 };
            let span = high.logit - low.logit;
            let logit = logit.clamp(low.logit + margin * span, high.logit - margin * span);
            let scores = (self.measure)(&vec![sensitivity(logit); self.layers])?;
            // routes of later layers depend on those of earlier ones, so the width may dip: keep it ascending
            let width = scores.width.clamp(low.width, high.width);
            self.known.insert(above, Measured { logit, width, scores });
            passes += 1;
        }
    }

    /// The best of both ends of a jump and of layers divided between them.
    fn split(&self, bracket: &Bracket, width: f64) -> Result<(Sensitivity, f64)> {
        let distance = |found: f64| (found - width).abs();
        let nearest = bracket.nearest(width);
        let mut best = (Sensitivity::Uniform(sensitivity(nearest.logit)), nearest.width);
        if distance(nearest.width) <= 10.0 * TOLERANCE {
            return Ok(best);
        }
        // the more layers take the upper side, the wider
        let (mut few, mut many) = (0, self.layers);
        while many - few > 1 {
            let first = usize::midpoint(few, many);
            let at = |layer: usize| {
                sensitivity(if layer < first { bracket.high.logit } else { bracket.low.logit })
            };
            let list: Vec<f64> = (0..self.layers).map(at).collect();
            let found = (self.measure)(&list)?.width;
            if found < width {
                few = first
            } else {
                many = first
            }
            if distance(found) < distance(best.1) {
                best = (Sensitivity::PerLayer(list), found);
            }
        }
        Ok(best)
    }

    /// The map of router logits after which sensitivity 0.2 gives a fifth of the way from the narrowest mean width to the
    /// full one, and 0.8 four fifths. So the dial means the same for every model and every price. None if no sensitivity
    /// comes near those widths.
    ///
    /// # Errors
    /// Those of the measurements.
    fn dial_scale(&mut self) -> Result<Option<DialScale>> {
        let narrowest = self.known[0].width;
        let mut at = |share: f64| self.logit(narrowest + share * (1.0 - narrowest));
        let (Some(low), Some(high)) = (at(0.2)?, at(0.8)?) else { return Ok(None) };
        let wanted = f64::ln(0.8 / 0.2);
        let scale = 2.0 * wanted / (high - low);
        Ok((high - low > CLOSE).then_some(DialScale { scale, shift: wanted - scale * high }))
    }

    /// Solves every one of `widths`, less the `drift` there, and returns the rows of a checkpoint's table, ascending. A row
    /// has the width asked for if that was reached, else the one to expect. Widths with the same result make one row.
    ///
    /// # Errors
    /// Those of [`Solver::solve`].
    fn table(&mut self, widths: &[f64], drift: &Drift, progress: &Progress) -> Result<Vec<Budget>> {
        let mut rows: Vec<Budget> = Vec::new();
        for &asked in widths {
            dynamoe::dial::check_dial("budget", asked)?;
            let drift = drift.at(asked);
            let (sensitivity, found) = self.solve((asked - drift).clamp(0.0, 1.0))?;
            let found = found + drift;
            let width = if (found - asked).abs() <= TOLERANCE { asked } else { found };
            if rows.iter().all(|row| (row.width - width).abs() > 1e-9) {
                rows.push(Budget { width, sensitivity });
            }
            progress.add(1);
        }
        rows.sort_by(|a, b| a.width.total_cmp(&b.width));
        Ok(rows)
    }
}

#[cfg(test)]
mod tests;

//! Solving the dial for a mean width, on calibration text.

use anyhow::Result;
use dynamoe::{Budget, Sensitivity};

use super::score::mean_width;
use crate::data::PaddedBatch;
use dynamoe_model::RoutedModel;

/// Widths of the table that a finished run stores.
pub const TABLE: [f64; 14] = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// A width this close to the one asked for is good enough.
const TOLERANCE: f64 = 0.002;
/// Beyond this, a dial's logit stands for an end of the dial.
const FAR: f64 = 16.0;
/// Dials closer than this, as logits, are not told apart.
const CLOSE: f64 = 1e-3;

/// A dial's logit (see [`dynamoe::router::logit`]) and the mean width measured there.
type Known = (f64, f64);

/// Solves the dial of a model on calibration text; what it has measured for one width serves the next. It works
/// on logits, since a router may put all that matters close to an end of the dial.
pub struct Solver<'a> {
    model: &'a RoutedModel,
    batches: &'a [PaddedBatch],
    /// Ascending in both.
    known: Vec<Known>,
}

/// The sensitivity of a logit; beyond [`FAR`], exactly 0 or 1.
fn sensitivity(logit: f64) -> f64 {
    match logit {
        x if x <= -FAR => 0.0,
        x if x >= FAR => 1.0,
        x => 1.0 / (1.0 + (-x).exp()),
    }
}

impl<'a> Solver<'a> {
    /// A solver on `batches`.
    ///
    /// # Errors
    /// candle's; no tokens to measure on.
    pub fn new(model: &'a RoutedModel, batches: &'a [PaddedBatch]) -> Result<Self> {
        let mut solver = Self { model, batches, known: vec![(FAR, 1.0)] };
        let narrowest = solver.measure(&vec![0.0; solver.layers()])?;
        solver.known.insert(0, (-FAR, narrowest));
        Ok(solver)
    }

    fn layers(&self) -> usize {
        self.model.config().num_hidden_layers
    }

    fn measure(&self, sensitivity: &[f64]) -> Result<f64> {
        mean_width(self.model, self.batches, sensitivity)
    }

    /// The widest and the narrowest mean width that the dial reaches.
    pub fn range(&self) -> (f64, f64) {
        (self.known[0].1, 1.0)
    }

    /// The sensitivity whose mean width comes closest to `width`, and the width it gives.
    ///
    /// Where one dial for all layers jumps over the width (a static router, or routers that know few scores),
    /// the first layers take the value above the jump and the others that below.
    ///
    /// # Errors
    /// A width outside 0 to 1; candle's.
    pub fn solve(&mut self, width: f64) -> Result<(Sensitivity, f64)> {
        let (low, high) = self.bracket(width)?;
        for end in [low, high] {
            if (end.1 - width).abs() <= TOLERANCE || width < low.1 {
                return Ok((Sensitivity::Uniform(sensitivity(end.0)), end.1));
            }
        }
        self.split(low, high, width)
    }

    /// The logit at which the mean width is `width`, if some dial comes close to it.
    ///
    /// # Errors
    /// As [`Solver::solve`].
    pub fn logit(&mut self, width: f64) -> Result<Option<f64>> {
        let (low, high) = self.bracket(width)?;
        let found = [low, high].into_iter().find(|end| (end.1 - width).abs() <= TOLERANCE);
        Ok(found.map(|end| end.0).filter(|logit| logit.abs() < FAR))
    }

    /// Two neighbouring measurements around `width`, one of them within [`TOLERANCE`] where that is possible.
    fn bracket(&mut self, width: f64) -> Result<(Known, Known)> {
        dynamoe::config::check_dial("budget", width)?;
        loop {
            let above = self.known.partition_point(|known| known.1 < width).min(self.known.len() - 1);
            let (low, high) = (self.known[above.saturating_sub(1)], self.known[above]);
            let near = [low, high].iter().any(|end| (end.1 - width).abs() <= TOLERANCE);
            if near || above == 0 || high.0 - low.0 < CLOSE {
                return Ok((low, high));
            }
            // linear between the neighbours, but never so close to one that the other stays far
            let share = ((width - low.1) / (high.1 - low.1)).clamp(0.2, 0.8);
            let middle = low.0 + share * (high.0 - low.0);
            let found = self.measure(&vec![sensitivity(middle); self.layers()])?;
            // routes of later layers depend on those of earlier ones, so the width may dip: keep it ascending
            self.known.insert(above, (middle, found.clamp(low.1, high.1)));
        }
    }

    /// The best of both ends of a jump, and of layers divided between them.
    fn split(&self, low: Known, high: Known, width: f64) -> Result<(Sensitivity, f64)> {
        let nearest = if width - low.1 < high.1 - width { low } else { high };
        let mut best = (Sensitivity::Uniform(sensitivity(nearest.0)), nearest.1);
        if (nearest.1 - width).abs() > 10.0 * TOLERANCE {
            for first in 1..self.layers() {
                let at = |layer: usize| sensitivity(if layer < first { high.0 } else { low.0 });
                let list: Vec<f64> = (0..self.layers()).map(at).collect();
                let found = self.measure(&list)?;
                if (found - width).abs() < (best.1 - width).abs() {
                    best = (Sensitivity::PerLayer(list), found);
                }
            }
        }
        Ok(best)
    }
}

/// The map `logit → scale · logit + shift` of router logits after which sensitivity 0.2 gives a fifth and 0.8 four
/// fifths of the way from the narrowest mean width to the full one, so that the dial means the same whatever the
/// model and the price it was trained with. None where no dial comes near those widths.
///
/// # Errors
/// Those of [`Solver::solve`].
pub fn dial_scale(model: &RoutedModel, batches: &[PaddedBatch]) -> Result<Option<(f64, f64)>> {
    let mut solver = Solver::new(model, batches)?;
    let (narrowest, full) = solver.range();
    let mut at = |share: f64| solver.logit(narrowest + share * (full - narrowest));
    let (Some(low), Some(high)) = (at(0.2)?, at(0.8)?) else { return Ok(None) };
    let wanted = f64::ln(0.8 / 0.2);
    let scale = 2.0 * wanted / (high - low);
    Ok((high - low > CLOSE).then_some((scale, wanted - scale * high)))
}

/// Solves every width of `widths` and returns the rows of a checkpoint's table, ascending, under the width that
/// was really reached. Widths that cannot be told apart make one row.
///
/// # Errors
/// Those of [`Solver::solve`].
pub fn table(model: &RoutedModel, batches: &[PaddedBatch], widths: &[f64]) -> Result<Vec<Budget>> {
    let mut solver = Solver::new(model, batches)?;
    let mut rows: Vec<Budget> = Vec::new();
    for &asked in widths {
        let (sensitivity, found) = solver.solve(asked)?;
        let width = if (found - asked).abs() <= TOLERANCE { asked } else { found };
        if rows.iter().all(|row| (row.width - width).abs() > 1e-9) {
            rows.push(Budget { width, sensitivity });
        }
    }
    rows.sort_by(|a, b| a.width.total_cmp(&b.width));
    Ok(rows)
}

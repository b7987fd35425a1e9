//! Solving the dial for a mean width, on calibration text.

use anyhow::Result;
use dynamoe::{Budget, Sensitivity};

use super::score::{Policy, score};
use crate::data::PaddedBatch;
use crate::model::RoutedModel;

/// Widths of the table that a finished run stores.
pub const TABLE: [f64; 14] = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// A width this close to the one asked for is good enough.
const TOLERANCE: f64 = 0.002;
/// Measurements for one width at most.
const TRIES: usize = 16;

/// Solves the dial of a model on calibration text; what it has measured for one width serves the next.
pub struct Solver<'a> {
    model: &'a RoutedModel,
    batches: &'a [PaddedBatch],
    /// Sensitivity and mean width, ascending in both.
    known: Vec<(f64, f64)>,
}

impl<'a> Solver<'a> {
    /// A solver on `batches`.
    ///
    /// # Errors
    /// candle's; no tokens to measure on.
    pub fn new(model: &'a RoutedModel, batches: &'a [PaddedBatch]) -> Result<Self> {
        let mut solver = Self { model, batches, known: vec![(1.0, 1.0)] };
        let narrowest = solver.measure(&vec![0.0; solver.layers()])?;
        solver.known.insert(0, (0.0, narrowest));
        Ok(solver)
    }

    fn layers(&self) -> usize {
        self.model.config().num_hidden_layers
    }

    fn measure(&self, sensitivity: &[f64]) -> Result<f64> {
        Ok(score(self.model, self.batches, &Policy::Dial(sensitivity))?.mean_width())
    }

    /// The sensitivity whose mean width comes closest to `width`, and the width it gives.
    ///
    /// Where one dial for all layers jumps over the width (a static router, or routers that know few scores),
    /// the first layers take the value above the jump and the others that below.
    ///
    /// # Errors
    /// A width outside 0 to 1; candle's.
    pub fn solve(&mut self, width: f64) -> Result<(Sensitivity, f64)> {
        dynamoe::config::check_dial("budget", width)?;
        for _ in 0..TRIES {
            let above = self.known.partition_point(|known| known.1 < width).min(self.known.len() - 1);
            let (low, high) = (self.known[above.saturating_sub(1)], self.known[above]);
            for end in [low, high] {
                if (end.1 - width).abs() <= TOLERANCE || above == 0 {
                    return Ok((Sensitivity::Uniform(end.0), end.1));
                }
            }
            if high.0 - low.0 < 1e-4 {
                return self.split(low, high, width);
            }
            // linear between the neighbours, but never so close to one that the other stays far
            let share = ((width - low.1) / (high.1 - low.1)).clamp(0.1, 0.9);
            let middle = low.0 + share * (high.0 - low.0);
            let found = self.measure(&vec![middle; self.layers()])?;
            // routes of later layers depend on those of earlier ones, so the width may dip: keep it ascending
            self.known.insert(above, (middle, found.clamp(low.1, high.1)));
        }
        let above = self.known.partition_point(|known| known.1 < width).min(self.known.len() - 1);
        self.split(self.known[above.saturating_sub(1)], self.known[above], width)
    }

    /// The best of both ends of a jump, and of layers divided between them.
    fn split(&self, low: (f64, f64), high: (f64, f64), width: f64) -> Result<(Sensitivity, f64)> {
        let nearest = if width - low.1 < high.1 - width { low } else { high };
        let mut best = (Sensitivity::Uniform(nearest.0), nearest.1);
        if (nearest.1 - width).abs() > 10.0 * TOLERANCE {
            for first in 1..self.layers() {
                let list: Vec<f64> =
                    (0..self.layers()).map(|l| if l < first { high.0 } else { low.0 }).collect();
                let found = self.measure(&list)?;
                if (found - width).abs() < (best.1 - width).abs() {
                    best = (Sensitivity::PerLayer(list), found);
                }
            }
        }
        Ok(best)
    }
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

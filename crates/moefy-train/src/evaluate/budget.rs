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
/// Halvings of the dial: finer than any router's scores resolve.
const HALVINGS: usize = 18;

/// The sensitivity whose mean width on `batches` comes closest to `width`, and the width it gives.
///
/// Where one dial for all layers jumps over the width (a static router, or routers that know few scores), the
/// first layers take the value above the jump and the others that below.
///
/// # Errors
/// A width outside 0 to 1; candle's.
pub fn solve(model: &RoutedModel, batches: &[PaddedBatch], width: f64) -> Result<(Sensitivity, f64)> {
    dynamoe::config::check_dial("budget", width)?;
    let layers = model.config().num_hidden_layers;
    let at = |s: &[f64]| -> Result<f64> { Ok(score(model, batches, &Policy::Dial(s))?.mean_width()) };
    let measure = |s: f64| at(&vec![s; layers]);
    let (mut low, mut high) = ((0.0, measure(0.0)?), (1.0, 1.0));
    if width <= low.1 {
        return Ok((Sensitivity::Uniform(0.0), low.1));
    }
    if width >= 1.0 {
        return Ok((Sensitivity::Uniform(1.0), 1.0));
    }
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low.0 + high.0);
        let found = measure(middle)?;
        if (found - width).abs() <= TOLERANCE {
            return Ok((Sensitivity::Uniform(middle), found));
        }
        if found < width { low = (middle, found) } else { high = (middle, found) }
    }
    let nearest = if width - low.1 < high.1 - width { low } else { high };
    let mut best = (Sensitivity::Uniform(nearest.0), nearest.1);
    if (nearest.1 - width).abs() > 10.0 * TOLERANCE {
        for first in 1..layers {
            let list: Vec<f64> = (0..layers).map(|l| if l < first { high.0 } else { low.0 }).collect();
            let found = at(&list)?;
            if (found - width).abs() < (best.1 - width).abs() {
                best = (Sensitivity::PerLayer(list), found);
            }
        }
    }
    Ok(best)
}

/// Solves every width of `widths` and returns the rows of a checkpoint's table, ascending, under the width that
/// was really reached. Widths that cannot be told apart make one row.
///
/// # Errors
/// Those of [`solve`].
pub fn table(model: &RoutedModel, batches: &[PaddedBatch], widths: &[f64]) -> Result<Vec<Budget>> {
    let mut rows: Vec<Budget> = Vec::new();
    for &asked in widths {
        let (sensitivity, found) = solve(model, batches, asked)?;
        let width = if (found - asked).abs() <= TOLERANCE { asked } else { found };
        if rows.iter().all(|row| (row.width - width).abs() > 1e-9) {
            rows.push(Budget { width, sensitivity });
        }
    }
    rows.sort_by(|a, b| a.width.total_cmp(&b.width));
    Ok(rows)
}

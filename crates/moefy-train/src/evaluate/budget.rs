//! Solves the dial for a mean width, on calibration text.

use anyhow::Result;
use dynamoe::{Budget, Sensitivity};

use super::score::mean_width;
use crate::data::PaddedBatch;
use crate::progress::Progress;
use dynamoe_model::RoutedModel;

/// Widths of the table that a finished run stores.
pub const TABLE: [f64; 14] = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];

/// A width this close to the one asked for is good enough.
const TOLERANCE: f64 = 0.002;
/// A logit beyond this stands for an end of the dial.
const FAR: f64 = 16.0;
/// Logits closer than this count as one.
const CLOSE: f64 = 1e-3;

/// A place on the dial and what was measured there.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Measured {
    /// The logit of the sensitivity (see [`dynamoe::router::logit`]).
    logit: f64,
    /// The mean width.
    width: f64,
}

impl Measured {
    fn distance(&self, width: f64) -> f64 {
        (self.width - width).abs()
    }

    fn is_at(&self, width: f64) -> bool {
        self.distance(width) <= TOLERANCE
    }
}

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

/// Solves a model's dial. It searches over logits, since all scores of a router may be close to one end of the dial. What
/// it measured for one width it uses for the next.
pub struct Solver<F> {
    /// The mean width for a sensitivity of each layer.
    measure: F,
    layers: usize,
    /// Ascending in both.
    known: Vec<Measured>,
}

/// A solver for `model` on `batches`.
///
/// # Errors
/// No tokens to measure on.
pub fn solver(
    model: &RoutedModel,
    batches: &[PaddedBatch],
) -> Result<Solver<impl Fn(&[f64]) -> Result<f64>>> {
    let measure = |sensitivity: &[f64]| mean_width(model, batches, sensitivity);
    Solver::new(model.config().num_hidden_layers, measure)
}

impl<F: Fn(&[f64]) -> Result<f64>> Solver<F> {
    /// A solver for whatever has the mean width `measure(sensitivity of each layer)`. At full sensitivity that must be 1.
    ///
    /// # Errors
    /// Those of `measure`.
    fn new(layers: usize, measure: F) -> Result<Self> {
        let narrowest = Measured { logit: -FAR, width: measure(&vec![0.0; layers])? };
        let full = Measured { logit: FAR, width: 1.0 };
        Ok(Self { measure, layers, known: vec![narrowest, full] })
    }

    /// The narrowest mean width that the dial reaches. The widest is 1.
    pub fn narrowest(&self) -> f64 {
        self.known[0].width
    }

    /// The sensitivity whose mean width comes closest to `width`, and that mean width.
    ///
    /// One sensitivity for all layers may jump over the width: with a static router, or with routers that give few
    /// different scores. Then the first layers take the value above the jump and the others the value below.
    ///
    /// # Errors
    /// A width outside 0 to 1.
    pub fn solve(&mut self, width: f64) -> Result<(Sensitivity, f64)> {
        let (low, high) = self.bracket(width)?;
        for end in [low, high] {
            if end.is_at(width) || width < low.width {
                return Ok((Sensitivity::Uniform(sensitivity(end.logit)), end.width));
            }
        }
        self.split(low, high, width)
    }

    /// The logit at which the mean width is `width`, if some sensitivity comes close to it.
    fn logit(&mut self, width: f64) -> Result<Option<f64>> {
        let (low, high) = self.bracket(width)?;
        let found = [low, high].into_iter().find(|end| end.is_at(width));
        Ok(found.map(|end| end.logit).filter(|logit| logit.abs() < FAR))
    }

    /// Two neighbouring measurements around `width`, one of them within [`TOLERANCE`] if that is possible.
    fn bracket(&mut self, width: f64) -> Result<(Measured, Measured)> {
        dynamoe::dial::check_dial("budget", width)?;
        loop {
            let above = self.known.partition_point(|known| known.width < width).min(self.known.len() - 1);
            let (low, high) = (self.known[above.saturating_sub(1)], self.known[above]);
            let near = low.is_at(width) || high.is_at(width);
            if near || above == 0 || high.logit - low.logit < CLOSE {
                return Ok((low, high));
            }
            // linear between the neighbours, but away from both, so that the bracket shrinks
            let share = ((width - low.width) / (high.width - low.width)).clamp(0.2, 0.8);
            let logit = low.logit + share * (high.logit - low.logit);
            let found = (self.measure)(&vec![sensitivity(logit); self.layers])?;
            // routes of later layers depend on those of earlier ones, so the width may dip: keep it ascending
            let width = found.clamp(low.width, high.width);
            self.known.insert(above, Measured { logit, width });
        }
    }

    /// The best of both ends of a jump and of layers divided between them.
    fn split(&self, low: Measured, high: Measured, width: f64) -> Result<(Sensitivity, f64)> {
        let nearest = if width - low.width < high.width - width { low } else { high };
        let mut best = (Sensitivity::Uniform(sensitivity(nearest.logit)), nearest.width);
        if nearest.distance(width) > 10.0 * TOLERANCE {
            for first in 1..self.layers {
                let at = |layer: usize| sensitivity(if layer < first { high.logit } else { low.logit });
                let list: Vec<f64> = (0..self.layers).map(at).collect();
                let found = (self.measure)(&list)?;
                if (found - width).abs() < (best.1 - width).abs() {
                    best = (Sensitivity::PerLayer(list), found);
                }
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
    pub fn dial_scale(&mut self) -> Result<Option<DialScale>> {
        let narrowest = self.narrowest();
        let mut at = |share: f64| self.logit(narrowest + share * (1.0 - narrowest));
        let (Some(low), Some(high)) = (at(0.2)?, at(0.8)?) else { return Ok(None) };
        let wanted = f64::ln(0.8 / 0.2);
        let scale = 2.0 * wanted / (high - low);
        Ok((high - low > CLOSE).then_some(DialScale { scale, shift: wanted - scale * high }))
    }

    /// Solves every one of `widths` and returns the rows of a checkpoint's table, ascending. A row has the width asked for
    /// if that was reached, else the one that was measured. Widths with the same result make one row.
    ///
    /// # Errors
    /// Those of [`Solver::solve`].
    pub fn table(&mut self, widths: &[f64]) -> Result<Vec<Budget>> {
        let mut rows: Vec<Budget> = Vec::new();
        let progress = Progress::new("solving the dial", "budgets", widths.len() as u64, 0);
        for &asked in widths {
            let (sensitivity, found) = self.solve(asked)?;
            let width = if (found - asked).abs() <= TOLERANCE { asked } else { found };
            if rows.iter().all(|row| (row.width - width).abs() > 1e-9) {
                rows.push(Budget { width, sensitivity });
            }
            progress.add(1);
        }
        progress.finish();
        rows.sort_by(|a, b| a.width.total_cmp(&b.width));
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// The mean of the layers' widths, a quarter or more, each a smooth function of its sensitivity.
    fn smooth(sensitivity: &[f64]) -> Result<f64> {
        let width = |s: &f64| 0.25 + 0.75 * s.powi(3);
        Ok(sensitivity.iter().map(width).sum::<f64>() / sensitivity.len() as f64)
    }

    /// Each layer is either as narrow as can be or full.
    fn jump(sensitivity: &[f64]) -> Result<f64> {
        let width = |s: &f64| if *s < 0.7 { 0.25 } else { 1.0 };
        Ok(sensitivity.iter().map(width).sum::<f64>() / sensitivity.len() as f64)
    }

    fn uniform(sensitivity: &Sensitivity) -> f64 {
        match sensitivity {
            Sensitivity::Uniform(s) => *s,
            other => panic!("expected one sensitivity, found {other:?}"),
        }
    }

    #[test]
    fn a_width_is_found_with_few_measurements() {
        let count = Cell::new(0);
        let measure = |list: &[f64]| {
            count.set(count.get() + 1);
            smooth(list)
        };
        let mut solver = Solver::new(3, measure).unwrap();
        for width in [0.3, 0.5, 0.75, 0.95] {
            let (found, reached) = solver.solve(width).unwrap();
            assert!((reached - width).abs() <= TOLERANCE, "{width}: {reached}");
            assert_eq!(smooth(&[uniform(&found); 3]).unwrap(), reached);
        }
        // A step leaves at most .8 of a bracket, which is 2 FAR = 32 at first. The width's slope is below 1/2 a logit, so a
        // bracket of 8e-3 spans at most 2 TOLERANCE: ln(32 / 8e-3) / ln(1 / .8) = 38 steps for a width.
        assert!(count.get() <= 1 + 4 * 38, "{} measurements", count.get());
        let before = count.get();
        solver.solve(0.5).unwrap();
        assert_eq!(count.get(), before, "what is known is not measured again");
    }

    #[test]
    fn both_ends_of_the_dial_are_found() {
        let mut solver = Solver::new(3, smooth).unwrap();
        assert_eq!(solver.narrowest(), 0.25);
        for (width, end, reached) in [(0.0, 0.0, 0.25), (0.1, 0.0, 0.25), (0.25, 0.0, 0.25), (1.0, 1.0, 1.0)]
        {
            assert_eq!(solver.solve(width).unwrap(), (Sensitivity::Uniform(end), reached), "{width}");
        }
        for wrong in [-0.1, 1.1, f64::NAN] {
            assert!(solver.solve(wrong).unwrap_err().to_string().contains("budget"), "{wrong}");
        }
    }

    #[test]
    fn layers_are_divided_where_the_width_jumps() {
        let mut solver = Solver::new(4, jump).unwrap();
        for (width, full_layers) in [(0.45, 1), (0.6, 2), (0.8, 3)] {
            let (found, reached) = solver.solve(width).unwrap();
            let Sensitivity::PerLayer(list) = &found else { panic!("{width}: {found:?}") };
            let full: Vec<bool> = list.iter().map(|&s| s >= 0.7).collect();
            assert!(full.is_sorted_by(|a, b| a >= b), "the first layers are the full ones: {list:?}");
            assert_eq!(full.iter().filter(|full| **full).count(), full_layers, "{width}: {list:?}");
            assert_eq!(reached, jump(list).unwrap());
        }
        // close to an end of the jump, one sensitivity for all layers serves
        assert_eq!(solver.solve(0.26).unwrap().1, 0.25);
        uniform(&solver.solve(0.99).unwrap().0);
    }

    #[test]
    fn a_dip_of_the_width_does_not_keep_the_search_going() {
        let dips = |list: &[f64]| Ok(if list[0] == 0.0 { 0.25 } else { 0.1 + 0.1 * list[0] });
        let mut solver = Solver::new(1, dips).unwrap();
        let (_, reached) = solver.solve(0.5).unwrap();
        assert!(reached == 0.25 || reached == 1.0, "{reached}");
    }

    #[test]
    fn a_rescaled_dial_covers_the_widths() {
        let scale = Solver::new(2, smooth).unwrap().dial_scale().unwrap().unwrap();
        for share in [0.2f64, 0.8] {
            // a router whose logit was mapped to that of `share` had this logit before
            let logit = ((share / (1.0 - share)).ln() - scale.shift) / scale.scale;
            let width = smooth(&[sensitivity(logit)]).unwrap();
            assert!((width - (0.25 + 0.75 * share)).abs() <= TOLERANCE, "{share}: {width}");
        }
        assert_eq!(Solver::new(2, jump).unwrap().dial_scale().unwrap(), None);
    }

    #[test]
    fn a_table_has_a_row_for_each_width_that_was_reached() {
        let table = |measure: fn(&[f64]) -> Result<f64>, widths: &[f64]| -> Vec<f64> {
            let rows = Solver::new(2, measure).unwrap().table(widths).unwrap();
            rows.iter().map(|row| row.width).collect()
        };
        assert_eq!(table(smooth, &[0.75, 0.3, 0.5]), [0.3, 0.5, 0.75]);
        // two layers that jump reach .25, .625 and 1 only
        assert_eq!(table(jump, &[0.3, 0.4, 0.6, 0.65, 0.9]), [0.25, 0.625, 1.0]);
    }
}

//! The dial: how much of the FFN a token may use.

use crate::config::DynaMoeConfig;
use crate::error::{Error, Result};
use crate::sensitivity::Budget;
pub use crate::sensitivity::check_dial;

/// How much of the FFN a token may use, as a user asks for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dial {
    /// From 0 (always the smallest expert) to 1 (always the dense FFN).
    Sensitivity(f64),
    /// The mean width to aim at, as a share of the dense FFN's, through the checkpoint's table of budgets.
    Budget(f64),
}

impl Dial {
    /// The sensitivity of each layer.
    ///
    /// # Errors
    /// [`Error::Dial`] for a value outside 0 to 1, [`Error::Config`] for a budget without a table of budgets.
    pub fn sensitivities(self, config: &DynaMoeConfig, layers: usize) -> Result<Vec<f64>> {
        match self {
            Self::Sensitivity(sensitivity) => {
                check_dial("sensitivity", sensitivity)?;
                Ok(vec![sensitivity; layers])
            }
            Self::Budget(width) => config.sensitivity_for_budget(width, layers),
        }
    }
}

impl DynaMoeConfig {
    /// The sensitivity of every layer for a mean width, interpolated in the table of budgets. The ends of the
    /// dial belong to every table: width 1 is sensitivity 1, and the smallest expert's share is sensitivity 0.
    ///
    /// # Errors
    /// [`Error::Dial`] for a width outside 0 to 1, [`Error::Config`] for an empty table.
    pub fn sensitivity_for_budget(&self, width: f64, layers: usize) -> Result<Vec<f64>> {
        sensitivities_for_budget(&self.budgets, self.width_shares()[0], width, layers)?.ok_or_else(|| {
            Error::Config(
                "the table of budgets is empty: run `moefy-train evaluate --budget …` once, or set a sensitivity"
                    .into(),
            )
        })
    }
}

/// The sensitivity of every layer for a mean width, interpolated in a table of budgets. `smallest` is the width at
/// sensitivity 0. Nothing if the table is empty and the width below 1.
///
/// # Errors
/// [`Error::Dial`] for a width outside 0 to 1.
pub fn sensitivities_for_budget(
    budgets: &[Budget],
    smallest: f64,
    width: f64,
    layers: usize,
) -> Result<Option<Vec<f64>>> {
    check_dial("budget", width)?;
    if width >= 1.0 {
        return Ok(Some(vec![1.0; layers]));
    }
    if budgets.is_empty() {
        return Ok(None);
    }
    let mut low = (smallest, vec![0.0; layers]);
    if width <= low.0 {
        return Ok(Some(low.1));
    }
    let rows =
        budgets.iter().map(|b| (b.width, (0..layers).map(|l| b.sensitivity.at(l)).collect::<Vec<_>>()));
    for (to, high) in rows.chain([(1.0, vec![1.0; layers])]) {
        if to >= width {
            let t = if to > low.0 { (width - low.0) / (to - low.0) } else { 1.0 };
            return Ok(Some(low.1.iter().zip(&high).map(|(a, b)| a + t * (b - a)).collect()));
        }
        low = (to, high);
    }
    Ok(Some(vec![1.0; layers]))
}

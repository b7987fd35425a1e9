//! The dial: how much of the FFN a token may use.

use serde::{Deserialize, Serialize};

use crate::config::DynaMoeConfig;
use crate::error::{Error, Result};

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

/// Checks that a dial's value is a number from 0 to 1.
///
/// # Errors
/// [`Error::Dial`] names the dial and the value found.
pub fn check_dial(dial: &'static str, found: f64) -> Result<()> {
    if (0.0..=1.0).contains(&found) { Ok(()) } else { Err(Error::Dial { dial, found }) }
}

/// A dial: one sensitivity for all layers, or one for each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Sensitivity {
    /// The same for every layer.
    Uniform(f64),
    /// One for each layer, first layer first.
    PerLayer(Vec<f64>),
}

impl Sensitivity {
    /// The sensitivity of layer `layer`.
    ///
    /// # Panics
    /// If a per-layer list is shorter; [`DynaMoeConfig::validate`] excludes it.
    pub fn at(&self, layer: usize) -> f64 {
        match self {
            Self::Uniform(s) => *s,
            Self::PerLayer(list) => list[layer],
        }
    }

    fn values(&self) -> &[f64] {
        match self {
            Self::Uniform(s) => std::slice::from_ref(s),
            Self::PerLayer(list) => list,
        }
    }

    /// Checks that every value is a number from 0 to 1 and that a per-layer list has `layers` entries.
    ///
    /// # Errors
    /// [`Error::Dial`] or [`Error::Config`].
    pub fn validate(&self, layers: usize) -> Result<()> {
        self.values().iter().try_for_each(|&s| check_dial("sensitivity", s))?;
        match self {
            Self::PerLayer(list) if list.len() != layers => Err(Error::Config(format!(
                "a per-layer sensitivity must have one entry for each of the {layers} layers, found {}",
                list.len()
            ))),
            _ => Ok(()),
        }
    }
}

/// A row of the table that turns a mean width into a sensitivity, measured on calibration data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Mean FFN width over tokens and layers, as a share of the dense width.
    pub width: f64,
    /// The sensitivity that gives it.
    pub sensitivity: Sensitivity,
}

impl DynaMoeConfig {
    /// The sensitivity of every layer for a mean width, interpolated in the table of budgets. The ends of the
    /// dial belong to every table: width 1 is sensitivity 1, and the smallest expert's share is sensitivity 0.
    ///
    /// # Errors
    /// [`Error::Dial`] for a width outside 0 to 1, [`Error::Config`] for an empty table.
    pub fn sensitivity_for_budget(&self, width: f64, layers: usize) -> Result<Vec<f64>> {
        check_dial("budget", width)?;
        let spread = |s: &Sensitivity| (0..layers).map(|l| s.at(l)).collect::<Vec<_>>();
        if width >= 1.0 {
            return Ok(vec![1.0; layers]);
        }
        if self.budgets.is_empty() {
            return Err(Error::Config(
                "the table of budgets is empty: run `moefy-train evaluate --budget …` once, or set a sensitivity"
                    .into(),
            ));
        }
        let mut low = (self.width_shares()[0], vec![0.0; layers]);
        if width <= low.0 {
            return Ok(low.1);
        }
        for (to, high) in
            self.budgets.iter().map(|b| (b.width, spread(&b.sensitivity))).chain([(1.0, vec![1.0; layers])])
        {
            if to >= width {
                let t = if to > low.0 { (width - low.0) / (to - low.0) } else { 1.0 };
                return Ok(low.1.iter().zip(&high).map(|(a, b)| a + t * (b - a)).collect());
            }
            low = (to, high);
        }
        Ok(vec![1.0; layers])
    }
}

//! Sensitivities, as config.json holds them: the value that a router's score must reach.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Checks that a dial's value is a number from 0 to 1.
///
/// # Errors
/// [`Error::Dial`] names the dial and the value found.
pub fn check_dial(dial: &'static str, found: f64) -> Result<()> {
    if (0.0..=1.0).contains(&found) { Ok(()) } else { Err(Error::Dial { dial, found }) }
}

/// One sensitivity for all layers, or one for each.
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
    /// If a per-layer list is shorter; [`Sensitivity::validate`] excludes it.
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

//! The `dynamoe` section of a checkpoint's config.json.
//!
//! docs/checkpoint-format.md specifies the section; this file is its reader, writer and judge.

use serde::{Deserialize, Serialize};

use crate::activation::HiddenAct;
use crate::error::{Error, Result};
use crate::sensitivity::{Budget, check_dial};

/// `architectures[0]` of a DynaMoE checkpoint.
pub const ARCHITECTURE: &str = "DynaMoeForCausalLM";
/// `model_type` of a DynaMoE checkpoint.
pub const MODEL_TYPE: &str = "dynamoe";
/// The newest format version that this build reads.
pub const FORMAT_VERSION: u32 = 3;

/// How a token's expert is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum RouterKind {
    /// A small MLP scores every expert but the largest; a token takes the smallest that scores at least the
    /// sensitivity.
    Mlp,
    /// No router: the score of expert `e` is its share of the width, `H_e / I`, for every token (static
    /// nesting, as in MatFormer). The layer has no router tensors.
    Static,
}

/// The router of every layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// How a token's expert is chosen.
    pub kind: RouterKind,
    /// Width of the router's hidden layer (0 for [`RouterKind::Static`]).
    pub hidden_size: usize,
    /// Whether layers carry `router.compensation`.
    #[serde(default)]
    pub compensation: bool,
}

/// The `dynamoe` section of config.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DynaMoeConfig {
    /// Version of the checkpoint format.
    pub version: u32,
    /// `architectures[0]` of the dense model.
    pub base_architecture: String,
    /// `model_type` of the dense model.
    pub base_model_type: String,
    /// The activation of the gate. Other than SiLU needs version 3.
    #[serde(default, skip_serializing_if = "is_silu")]
    pub hidden_act: HiddenAct,
    /// `H_e`: neurons of each nested expert, strictly increasing; the last is the dense FFN's width.
    pub expert_widths: Vec<usize>,
    /// For how many of the first shells the smaller experts, all but the largest, have separate weights: 0 where they
    /// share all neurons with the dense FFN. Needs version 2.
    #[serde(default, rename = "own_shells", skip_serializing_if = "is_zero")]
    pub separate_shells: usize,
    /// The router of every layer.
    pub router: RouterConfig,
    /// The dial's default.
    pub sensitivity: f64,
    /// Sensitivities for mean widths, ascending in `width`.
    #[serde(default)]
    pub budgets: Vec<Budget>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

fn is_silu(act: &HiddenAct) -> bool {
    *act == HiddenAct::Silu
}

/// The oldest format version that can hold this many separate shells and this activation.
pub fn version_for(separate_shells: usize, hidden_act: HiddenAct) -> u32 {
    match (separate_shells, hidden_act) {
        (0, HiddenAct::Silu) => 1,
        (_, HiddenAct::Silu) => 2,
        _ => 3,
    }
}

/// Checks that the smaller of `experts` experts can have separate weights for this many shells.
///
/// # Errors
/// [`Error::Count`] if there are fewer smaller experts than that.
pub fn check_separate_shells(separate_shells: usize, experts: usize) -> Result<()> {
    if separate_shells < experts.max(1) {
        return Ok(());
    }
    let what = "the number of shells with separate weights (own_shells)";
    Err(Error::Count { what, least: 0, most: experts.saturating_sub(1), found: separate_shells })
}

/// Checks that `widths` are strictly increasing and end at the dense width.
///
/// # Errors
/// [`Error::Widths`] otherwise.
pub fn check_widths(widths: &[usize], intermediate_size: usize) -> Result<()> {
    let increasing = widths.windows(2).all(|pair| pair[0] < pair[1]);
    if increasing && widths.first().is_some_and(|&w| w > 0) && widths.last() == Some(&intermediate_size) {
        return Ok(());
    }
    Err(Error::Widths { widths: widths.to_vec(), intermediate_size })
}

/// `experts` nested widths `(e + 1) / experts · intermediate_size` (the paper's), each rounded up to the
/// largest block of 256, 64, 32 or 1 neurons that keeps them apart: quantized blocks and tensor cores want
/// multiples of 256.
///
/// # Errors
/// [`Error::Count`] if `experts` is 0 or exceeds the width.
pub fn even_widths(intermediate_size: usize, experts: usize) -> Result<Vec<usize>> {
    if experts == 0 || experts > intermediate_size {
        let what = "the number of experts of an FFN";
        return Err(Error::Count { what, least: 1, most: intermediate_size, found: experts });
    }
    for block in [256, 64, 32, 1] {
        let widths: Vec<usize> = (1..=experts)
            .map(|e| (e * intermediate_size).div_ceil(experts).next_multiple_of(block).min(intermediate_size))
            .collect();
        // a block that is no part of a step and more than an eighth of it would bend the widths
        let step = intermediate_size / experts;
        let fits = step.is_multiple_of(block) || step >= 8 * block;
        if fits && check_widths(&widths, intermediate_size).is_ok() {
            return Ok(widths);
        }
    }
    unreachable!("blocks of 1 keep up to intermediate_size widths apart")
}

impl DynaMoeConfig {
    /// Reads and checks the section of a whole config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for a missing section, an unknown or missing key or a wrong type; [`Error::Version`]
    /// for a newer format; and all of [`DynaMoeConfig::validate`]'s.
    pub fn from_config_json(config: &serde_json::Value) -> Result<Self> {
        let section = config
            .get("dynamoe")
            .ok_or_else(|| Error::Config("not found: this is not a DynaMoE checkpoint".into()))?;
        let version = section.get("version").and_then(serde_json::Value::as_u64);
        if let Some(found) = version.filter(|&v| v > u64::from(FORMAT_VERSION)) {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(Error::Version { found, supported: FORMAT_VERSION });
        }
        let parsed: Self =
            serde_json::from_value(section.clone()).map_err(|error| Error::Config(error.to_string()))?;
        let number = |key: &str| {
            config
                .get(key)
                .and_then(serde_json::Value::as_u64)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| {
                    Error::Config(format!("config.json needs \"{key}\", a whole number, beside this section"))
                })
        };
        parsed.validate(number("intermediate_size")?, number("num_hidden_layers")?)?;
        Ok(parsed)
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self, intermediate_size: usize, layers: usize) -> Result<()> {
        if self.version == 0 {
            return Err(Error::Config("version must be 1 or more, found 0".into()));
        }
        check_widths(&self.expert_widths, intermediate_size)?;
        check_separate_shells(self.separate_shells, self.expert_count())
            .map_err(|error| Error::Config(error.to_string()))?;
        let needed = version_for(self.separate_shells, self.hidden_act);
        if self.version < needed {
            let key = if is_silu(&self.hidden_act) { "own_shells" } else { "hidden_act" };
            return Err(Error::Config(format!(
                "{key} needs version {needed} of the format, found version {}",
                self.version
            )));
        }
        check_dial("sensitivity", self.sensitivity)?;
        let mlp = self.router.kind == RouterKind::Mlp;
        if mlp != (self.router.hidden_size > 0) {
            return Err(Error::Config(format!(
                "router.hidden_size must be {} for a router of kind {:?}, found {}",
                if mlp { "1 or more" } else { "0" },
                self.router.kind,
                self.router.hidden_size
            )));
        }
        for budget in &self.budgets {
            check_dial("budget", budget.width)?;
            budget.sensitivity.validate(layers)?;
        }
        if !self.budgets.windows(2).all(|pair| pair[0].width < pair[1].width) {
            return Err(Error::Config("budgets must be strictly ascending in width".into()));
        }
        Ok(())
    }

    /// Number of nested experts.
    pub fn expert_count(&self) -> usize {
        self.expert_widths.len()
    }

    /// Neurons for which the smaller experts have separate weights, `H_{separate_shells - 1}`; 0 for none.
    pub fn separate_width(&self) -> usize {
        self.separate_shells.checked_sub(1).map_or(0, |last| self.expert_widths[last])
    }

    /// The widest expert: the dense FFN's `intermediate_size`.
    pub fn intermediate_size(&self) -> usize {
        self.expert_widths.last().copied().unwrap_or(0)
    }

    /// Each expert's share of the dense width, in (0, 1].
    pub fn width_shares(&self) -> Vec<f64> {
        let full = self.intermediate_size() as f64;
        self.expert_widths.iter().map(|&w| w as f64 / full).collect()
    }
}

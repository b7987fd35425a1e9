//! Training methods: how tokens choose experts while training, what that choice is charged, and how the trained model's
//! curve is measured. Everything that is special about a method is in its file.
//!
//! A new method is a file with an implementation of [`Definition`] and one of [`Objective`], a variant of [`Method`] and
//! a line in `Method::definition`.

mod dense;
mod draws;
mod priced;
mod prices;
mod random;
mod similarity;
mod static_nested;

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, ensure};
use candle_core::{Result, Tensor};
use dynamoe::TrainableFfn;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::evaluate::curve::{Place, Probe};
use crate::report::results::Curve;
use dynamoe::Dial;

/// How tokens are routed while training, and so what the model is trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Plain fine-tuning of the dense model.
    Dense,
    /// Static nesting (MatFormer).
    Static,
    /// Random widths.
    Random,
    /// The paper's router.
    Similarity,
    /// The router that learns from the loss and a price on width: the default.
    Priced,
}

/// All that distinguishes a method from the others.
pub trait Definition: Sync {
    /// What users type and files hold.
    fn name(&self) -> &'static str;

    /// The name in tables and legends.
    fn label(&self) -> &'static str;

    /// One sentence on how tokens get their widths.
    fn description(&self) -> &'static str;

    /// Whether the method trains a router.
    fn has_router(&self) -> bool {
        false
    }

    /// Whether routers' scores are rescaled before a model is published, so that the range of the dial is that of the
    /// widths.
    fn rescales_dial(&self) -> bool {
        false
    }

    /// How the method routes in training.
    fn objective(&self, routing: &Routing) -> Box<dyn Objective>;

    /// Where the curve of a trained model is measured: at the ends of its dial and at the probe's widths, in any order.
    fn places(&self, probe: &Probe<'_>) -> Vec<Place>;
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 5] = [Self::Dense, Self::Static, Self::Random, Self::Similarity, Self::Priced];

    fn definition(self) -> &'static dyn Definition {
        match self {
            Self::Dense => &dense::Dense,
            Self::Static => &static_nested::StaticNested,
            Self::Random => &random::RandomWidths,
            Self::Similarity => &similarity::Similarity,
            Self::Priced => &priced::Priced,
        }
    }

    /// What users type and files hold.
    pub fn name(self) -> &'static str {
        self.definition().name()
    }

    /// The name in tables and legends.
    pub fn label(self) -> &'static str {
        self.definition().label()
    }

    /// One sentence on how tokens get their widths.
    pub fn description(self) -> &'static str {
        self.definition().description()
    }

    /// Whether the method trains a router.
    pub fn has_router(self) -> bool {
        self.definition().has_router()
    }

    /// Whether routers' scores are rescaled before a model is published.
    pub fn rescales_dial(self) -> bool {
        self.definition().rescales_dial()
    }

    /// How the method routes in training.
    pub fn objective(self, routing: &Routing) -> Box<dyn Objective> {
        self.definition().objective(routing)
    }

    /// Loss against width of a model that this method trained.
    ///
    /// # Errors
    /// No text to measure on.
    pub fn curve(self, probe: &Probe<'_>) -> anyhow::Result<Curve> {
        let points = probe.points(&self.definition().places(probe))?;
        Ok(Curve::sorted(self.label(), self.description(), points))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        let known = || Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| anyhow::anyhow!("expected one of {}, found {name:?}", known()))
    }
}

/// What objectives need to know of the model and of the training.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// `H_e / I` of each expert, ascending to 1.
    pub width_shares: Vec<f64>,
    /// Sequences of the whole training.
    pub sequences: u64,
    /// Mean width that most sequences are trained near (priced).
    pub focus: f64,
    /// How strongly target widths concentrate near `focus`; 1 is uniform (priced).
    pub focus_power: f64,
    /// Share of sequences trained at full width.
    pub full_share: f64,
    /// Share of sequences trained at the narrowest width.
    pub narrowest_share: f64,
    /// Softness of the router's decisions for its gradient, in logits (priced).
    pub temperature: f64,
    /// Spread of the noise on router logits (priced).
    pub noise: f64,
}

/// One layer's input and parameters at one training step.
pub struct LayerInput<'a> {
    /// The FFN's input, (N, D).
    pub x: &'a Tensor,
    /// The router's logits, (N, E-1); none where the method has no router.
    pub logits: Option<&'a Tensor>,
    /// The layer's weights.
    pub ffn: &'a TrainableFfn,
    /// Each sequence's dial, (B), as [`Objective::sample`] drew them.
    pub dials: &'a [f64],
    /// Randomness of this layer and step.
    pub rng: &'a mut ChaCha8Rng,
}

/// What an objective made of a layer.
pub struct Routed {
    /// (N, E): 1 in the first column, never increasing along a row.
    pub reach: Tensor,
    /// Added to the step's loss, averaged over layers.
    pub loss: Option<Tensor>,
}

/// A way to route during training.
pub trait Objective: Send + Sync {
    /// Draws the dial of each of `sequences` sequences. What a dial's value means is the method's.
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64>;

    /// Routes one layer: turns its input into `reach (N, E)` for [`dynamoe::TrainableFfn::forward`].
    ///
    /// # Errors
    /// A router that is missing.
    fn route(&self, input: LayerInput<'_>) -> Result<Routed>;

    /// Learns from the mean widths `(B)` that sequences with these `dials` came out with.
    fn observe(&mut self, _dials: &[f64], _widths: &[f32]) {}

    /// What [`Objective::observe`] has learnt, for a checkpoint of the training.
    fn state(&self) -> Vec<f32> {
        Vec::new()
    }

    /// Puts back what [`Objective::state`] gave.
    ///
    /// # Errors
    /// A state of another length.
    fn restore(&mut self, state: &[f32]) -> anyhow::Result<()> {
        ensure!(state.is_empty(), "expected no state of the objective, found {} numbers", state.len());
        Ok(())
    }
}

/// Each sequence's value, repeated for its tokens: (N).
fn per_token<T: Copy>(values: &[T], tokens: usize) -> impl Iterator<Item = T> + '_ {
    let positions = tokens / values.len().max(1);
    (0..tokens).map(move |n| values[n / positions])
}

/// The router's logits, which `method` needs.
fn logits<'a>(input: &LayerInput<'a>, method: &str) -> Result<&'a Tensor> {
    match input.logits {
        Some(logits) => Ok(logits),
        None => candle_core::bail!("the {method} objective needs a router"),
    }
}

/// The places of a curve whose dial is looked up in the model's table of budgets.
fn routed_places(probe: &Probe<'_>) -> Vec<Place> {
    let ends = [0.0, 1.0].map(Dial::Sensitivity);
    ends.into_iter().chain(probe.widths_between().map(Dial::Budget)).map(Place::Dial).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use dynamoe::HiddenAct;

    /// A training of `shares` with everything else at its default.
    pub(super) fn routing(width_shares: &[f64]) -> Routing {
        Routing {
            width_shares: width_shares.to_vec(),
            sequences: 1000,
            focus: 0.45,
            focus_power: 2.0,
            full_share: 0.12,
            narrowest_share: 0.06,
            temperature: 1.0,
            noise: 0.1,
        }
    }

    pub(super) fn ffn(rng: &mut ChaCha8Rng, d: usize, widths: &[usize]) -> TrainableFfn {
        let i = widths[widths.len() - 1];
        let mut weight = |rows, columns| normal(rng, 1.0, (rows, columns));
        TrainableFfn {
            gate_proj: weight(i, d),
            up_proj: weight(i, d),
            down_proj: weight(d, i),
            separate: None,
            compensation: None,
            widths: widths.to_vec(),
            hidden_act: HiddenAct::default(),
        }
    }

    #[test]
    fn methods_are_known_by_their_names() {
        for method in Method::ALL {
            assert_eq!(method.name().parse::<Method>().unwrap(), method);
            assert_eq!(serde_json::to_value(method).unwrap(), method.name());
        }
        assert!(format!("{}", "wide".parse::<Method>().unwrap_err()).contains("dense, static, random"));
    }

    #[test]
    fn objectives_without_state_refuse_one() {
        for method in Method::ALL {
            let mut objective = method.objective(&routing(&[0.25, 0.5, 1.0]));
            let state = objective.state();
            objective.restore(&state).unwrap();
            assert!(objective.restore(&[state, vec![1.0]].concat()).is_err(), "{method}");
        }
    }
}

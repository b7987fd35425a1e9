//! The rotary embeddings that config.json asks for.

use std::f64::consts::TAU;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::keys::Keys;

/// Llama 3's stretching of the rotary frequencies (`rope_type: "llama3"`).
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Rope {
    /// `factor`
    pub factor: f64,
    /// `low_freq_factor`
    pub low_freq_factor: f64,
    /// `high_freq_factor`
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`
    pub original_max_position_embeddings: usize,
}

/// YaRN (arXiv 2309.00071): slow pairs are slowed down by `factor`, fast ones stay, those between are blended
/// (`rope_type: "yarn"`).
#[derive(Debug, Clone, PartialEq)]
pub struct YarnRope {
    /// `factor`
    pub factor: f64,
    /// Turns over the original positions above which a pair counts as fast (`beta_fast`).
    pub beta_fast: f64,
    /// Turns over the original positions below which a pair counts as slow (`beta_slow`).
    pub beta_slow: f64,
    /// `original_max_position_embeddings`
    pub original_max_position_embeddings: usize,
    /// Whether the ends of the blend are rounded to whole pairs (`truncate`).
    pub truncate: bool,
    /// Factor of all cosines and sines: `attention_factor`, or what `mscale` and `factor` make of it.
    pub attention_factor: f64,
}

/// Rescaling of rotary frequencies.
///
/// `rope_type: "dynamic"` rescales beyond `max_position_embeddings` only. Neither the trainer nor the engine goes
/// there, so it reads as no rescaling.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by a factor (`rope_type: "linear"`).
    Linear(f64),
    /// Llama 3's.
    Llama3(Llama3Rope),
    /// YaRN.
    Yarn(YarnRope),
}

impl RopeScaling {
    /// The name in config.json's `rope_type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Linear(_) => "linear",
            Self::Llama3(_) => "llama3",
            Self::Yarn(_) => "yarn",
        }
    }

    /// Radians per position of each of the `d/2` pairs of a head of `d` numbers, and the factor of cosines and sines.
    pub fn frequencies(theta: f64, d: usize, scaling: Option<&Self>) -> (Vec<f64>, f64) {
        let plain = (0..d / 2).map(|i| theta.powf(-((2 * i) as f64) / d as f64));
        match scaling {
            None => (plain.collect(), 1.0),
            Some(Self::Linear(factor)) => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            Some(Self::Llama3(rope)) => (plain.map(|frequency| rope.stretch(frequency)).collect(), 1.0),
            Some(Self::Yarn(rope)) => {
                let (low, high) = rope.blend(theta, d);
                let stretch = |(pair, frequency): (usize, f64)| {
                    let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    slow * frequency / rope.factor + (1.0 - slow) * frequency
                };
                (plain.enumerate().map(stretch).collect(), rope.attention_factor)
            }
        }
    }
}

impl Llama3Rope {
    /// Slow pairs are slowed down by `factor`, fast ones stay, those between are blended.
    fn stretch(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings as f64 * frequency / TAU;
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        let keep = if turns <= low {
            0.0
        } else if turns >= high {
            1.0
        } else {
            (turns - low) / (high - low)
        };
        keep * frequency + (1.0 - keep) * frequency / self.factor
    }
}

impl YarnRope {
    /// The pairs at which the blend begins and ends.
    fn blend(&self, theta: f64, d: usize) -> (f64, f64) {
        let positions = self.original_max_position_embeddings as f64;
        let pair = |turns: f64| d as f64 * (positions / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d as f64 - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }

    /// `attention_factor`, from `mscale` and `mscale_all_dim` where it is not given.
    fn attention_factor(keys: &Keys, factor: f64) -> Result<f64> {
        if let Some(given) = keys.number("attention_factor")? {
            return Ok(given);
        }
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let mscale = |key| keys.parse(key, "a number", Value::as_f64).map(|m| m.filter(|&m| m != 0.0));
        Ok(match (mscale("mscale")?, mscale("mscale_all_dim")?) {
            (Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        })
    }
}

/// `rope_theta` and the scaling. As in transformers, `rope_scaling` wins over `rope_parameters` where both are there
/// and not empty, and a `rope_theta` in the section wins over the one beside it.
/// `default` is the theta of a model that names none.
pub(super) fn read(keys: &Keys, positions: usize, default: f64) -> Result<(f64, Option<RopeScaling>)> {
    let theta = keys.number("rope_theta")?;
    let section = |key: &'static str| {
        let found = keys.get(key).filter(|found| found.as_object().is_none_or(|map| !map.is_empty()));
        found.map(|found| (key, found))
    };
    let Some((name, found)) = section("rope_scaling").or_else(|| section("rope_parameters")) else {
        return Ok((theta.unwrap_or(default), None));
    };
    ensure!(found.is_object(), "\"{name}\": expected an object, found {found}");
    let rope = Keys(found);
    let parse = || -> Result<_> {
        let rotary = rope.number("partial_rotary_factor")?.unwrap_or(1.0);
        ensure!(rotary == 1.0, "\"partial_rotary_factor\": only 1 is supported, found {rotary}");
        Ok((rope.number("rope_theta")?, scaling(keys, &rope, positions)?))
    };
    let (own_theta, scaling) = parse().with_context(|| format!("\"{name}\""))?;
    Ok((own_theta.or(theta).unwrap_or(default), scaling))
}

/// [`read`], and the theta of the layers with a window, which are not rescaled (Gemma 3): `rope_local_base_freq`, or in
/// transformers 5 a section for each kind of layer in `rope_parameters`.
pub(super) fn read_both(
    keys: &Keys,
    positions: usize,
    default: f64,
) -> Result<(f64, Option<RopeScaling>, f64)> {
    let local = keys.number("rope_local_base_freq")?.unwrap_or(10_000.0);
    let kinds = keys
        .get("rope_parameters")
        .map(|found| (found.get("full_attention"), found.get("sliding_attention")));
    let Some((full, sliding)) = kinds.filter(|kinds| *kinds != (None, None)) else {
        let (theta, scaling) = read(keys, positions, default)?;
        return Ok((theta, scaling, local));
    };
    let mut flat = keys.0.clone();
    flat["rope_parameters"] = full.cloned().unwrap_or_default();
    let (theta, scaling) = read(&Keys(&flat), positions, default)?;
    let of_sliding = || -> Result<f64> {
        let Some(sliding) = sliding else { return Ok(local) };
        let found = self::scaling(keys, &Keys(sliding), positions)?;
        ensure!(found.is_none(), "only \"rope_type\" \"default\" is supported, found {sliding}");
        Ok(Keys(sliding).number("rope_theta")?.unwrap_or(local))
    };
    Ok((theta, scaling, of_sliding().context("\"rope_parameters\": \"sliding_attention\"")?))
}

fn scaling(keys: &Keys, rope: &Keys, positions: usize) -> Result<Option<RopeScaling>> {
    let kind = rope
        .get("rope_type")
        .or_else(|| rope.get("type"))
        .map_or(Some("default"), Value::as_str)
        .context("\"rope_type\": expected a string")?;
    let needed = |key: &str| rope.number(key)?.with_context(|| format!("\"{key}\" is missing"));
    // transformers lets the key beside the section win
    let original = || -> Result<usize> {
        let key = "original_max_position_embeddings";
        Ok(keys.optional_size(key)?.or(rope.optional_size(key)?).unwrap_or(positions))
    };
    Ok(match kind {
        "default" | "dynamic" => None,
        "linear" => Some(RopeScaling::Linear(needed("factor")?)),
        "llama3" => Some(RopeScaling::Llama3(Llama3Rope {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        })),
        "yarn" => {
            let original_max_position_embeddings = original()?;
            let factor = match rope.is_absent("factor") {
                true => bail!("\"factor\" is missing"),
                // a null means the ratio of the positions
                false => rope
                    .number("factor")?
                    .unwrap_or(positions as f64 / original_max_position_embeddings as f64),
            };
            Some(RopeScaling::Yarn(YarnRope {
                factor,
                beta_fast: rope.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: rope.number("beta_slow")?.unwrap_or(1.0),
                original_max_position_embeddings,
                truncate: rope.flag("truncate")?.unwrap_or(true),
                attention_factor: YarnRope::attention_factor(rope, factor)?,
            }))
        }
        other => {
            bail!("rope_type {other:?} is not supported; supported: default, linear, dynamic, llama3, yarn")
        }
    })
}

//! Angles of rotary position embeddings (arXiv 2104.09864), with Hugging Face's rescalings.
//!
//! Pair `i` of a head, `(x[i], x[i + d/2])`, turns by `position · theta^(-2i/d)` at each position.

use std::f64::consts::TAU;

use candle_core::{Device, Result, Tensor};

use crate::config::{Llama3Rope, ModelConfig, RopeScaling};

/// Cosines and sines for positions `0..T`, each `(T, d/2)`, f32.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Cosines, `(T, d/2)`.
    pub cos: Tensor,
    /// Sines, `(T, d/2)`.
    pub sin: Tensor,
}

impl Rotary {
    /// The tables of the first `positions` positions on `device`.
    ///
    /// # Errors
    /// Those of the copy to the device.
    pub fn new(config: &ModelConfig, positions: usize, device: &Device) -> Result<Self> {
        let frequencies = frequencies(config);
        // The products are rounded to f32 before the cosine is taken, as in transformers.
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle)).collect();
            Tensor::from_vec(values, (positions, frequencies.len()), device)
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }
}

/// Radians per position of each of the `d/2` pairs.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    let d = config.head_dim;
    (0..d / 2)
        .map(|i| config.rope_theta.powf(-((2 * i) as f64) / d as f64))
        .map(|frequency| match &config.rope_scaling {
            None => frequency,
            Some(RopeScaling::Linear(factor)) => frequency / factor,
            Some(RopeScaling::Llama3(scaling)) => llama3(frequency, scaling),
        })
        .map(|frequency| frequency as f32)
        .collect()
}

/// Llama 3.1: slow pairs are slowed down by `factor`, fast ones stay, those between are blended.
fn llama3(frequency: f64, scaling: &Llama3Rope) -> f64 {
    let turns = scaling.original_max_position_embeddings as f64 * frequency / TAU;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let keep = if turns <= low {
        0.0
    } else if turns >= high {
        1.0
    } else {
        (turns - low) / (high - low)
    };
    keep * frequency + (1.0 - keep) * frequency / scaling.factor
}

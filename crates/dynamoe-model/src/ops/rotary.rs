//! Angles of rotary position embeddings (arXiv 2104.09864), with Hugging Face's rescalings.
//!
//! Pair `i` of a head, `(x[i], x[i + d/2])`, turns by `position · theta^(-2i/d)` at each position.

use candle_core::{Device, Result, Tensor};

use crate::config::{ModelConfig, RopeScaling};

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
    pub fn new(config: &ModelConfig, positions: usize, device: &Device) -> Result<Self> {
        let scaling = config.rope_scaling.as_ref();
        Self::tables(RopeScaling::frequencies(config.rope_theta, config.head_dim, scaling), positions, device)
    }

    /// Those of the layers with a window, if they have a theta of their own.
    pub fn local(config: &ModelConfig, positions: usize, device: &Device) -> Result<Option<Self>> {
        let frequencies =
            config.local_rope_theta.map(|theta| RopeScaling::frequencies(theta, config.head_dim, None));
        frequencies.map(|frequencies| Self::tables(frequencies, positions, device)).transpose()
    }

    /// The tables of frequencies, with the factor of cosines and sines.
    fn tables((frequencies, factor): (Vec<f64>, f64), positions: usize, device: &Device) -> Result<Self> {
        let (frequencies, factor): (Vec<f32>, f32) =
            (frequencies.into_iter().map(|frequency| frequency as f32).collect(), factor as f32);
        // The products are rounded to f32 before the cosine is taken, as in transformers.
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) * factor).collect();
            Tensor::from_vec(values, (positions, frequencies.len()), device)
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }
}

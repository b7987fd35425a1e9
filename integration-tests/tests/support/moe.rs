//! Tiny MoE models, whose logits by transformers are in fixtures/moe.json.

#![allow(dead_code)] // each test file uses some of it

use std::{collections::BTreeMap, fs, path::PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;

use crate::support;

/// What fixtures/make_moe.py made.
pub struct Fixtures {
    pub tokens: Vec<u32>,
    models: serde_json::Map<String, Value>,
}

/// A tiny model and its logits of the last token.
pub struct Fixture {
    pub name: String,
    /// `num_experts_per_tok`.
    pub experts_per_token: usize,
    json: Value,
}

pub fn fixtures() -> Fixtures {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/moe.json");
    let json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    Fixtures {
        tokens: serde_json::from_value(json["tokens"].clone()).unwrap(),
        models: serde_json::from_value(json["models"].clone()).unwrap(),
    }
}

impl Fixtures {
    pub fn all(&self) -> Vec<Fixture> {
        self.models.keys().map(|name| self.get(name)).collect()
    }

    pub fn get(&self, name: &str) -> Fixture {
        let json = self.models[name].clone();
        let experts_per_token = json["config"]["num_experts_per_tok"].as_u64().unwrap() as usize;
        Fixture { name: name.to_owned(), experts_per_token, json }
    }
}

impl Fixture {
    /// The model's folder.
    pub fn write(&self) -> TempDir {
        let folder = TempDir::new().unwrap();
        let tensors: BTreeMap<String, Tensor> = self.json["shapes"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, shape)| {
                let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
                let tensor = Tensor::from_vec(weight(name, shape.iter().product()), shape, &Device::Cpu);
                (name.clone(), tensor.unwrap())
            })
            .collect();
        support::write(folder.path(), &self.json["config"], &tensors);
        folder
    }

    /// Logits with `experts` experts for each token.
    pub fn logits(&self, experts: usize) -> Vec<f32> {
        serde_json::from_value(self.json["logits"][experts.to_string()].clone()).unwrap()
    }

    /// Sensitivities, and logits at each of them.
    pub fn sensitivities(&self) -> Vec<(f64, Vec<f32>)> {
        let list = self.json["sensitivities"].as_object().unwrap();
        list.iter()
            .map(|(key, logits)| (key.parse().unwrap(), serde_json::from_value(logits.clone()).unwrap()))
            .collect()
    }
}

/// As make_moe.py has them.
fn weight(name: &str, count: usize) -> Vec<f32> {
    let seed =
        name.bytes().fold(2_166_136_261_u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let number = |index: usize| {
        let x = (index as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        let x = (x ^ (x >> 15)).wrapping_mul(2_246_822_519);
        ((x ^ (x >> 13)) >> 16) as f32 / 32768.0 - 1.0
    };
    let is = |suffix: &str| name.ends_with(suffix);
    let of = |number: f32| match () {
        () if is("e_score_correction_bias") => 0.0,
        () if is("norm.weight") => 1.0 + number / 8.0,
        () if is("mlp.gate.weight") || is("block_sparse_moe.gate.weight") => number / 2.0,
        () => number / 4.0,
    };
    (0..count).map(|index| of(number(index))).collect()
}

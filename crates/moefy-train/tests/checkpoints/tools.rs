//! Checkpoints to damage, convert and look into.

use std::collections::BTreeMap;
use std::path::Path;

use dynamoe::{RouterConfig, RouterKind, tensors};
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::export::{ExportOptions, export};
use moefy_train::prepare::{Calibration, ConvertOptions, LayerStatistics};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{self, HIDDEN, LAYERS, WIDTH, contents, values};

pub const WIDTHS: [usize; 3] = [8, 12, WIDTH];
pub const NORM: &str = "model.norm.weight";
pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const LM_HEAD: &str = "lm_head.weight";

/// A scratch folder with a dense checkpoint in `dense`.
pub fn scratch(architecture: &str, dtype: Dtype, shards: usize) -> (TempDir, Checkpoint) {
    let dir = TempDir::new().unwrap();
    support::write(&dir.path().join("dense"), &support::config(architecture), dtype, shards);
    let checkpoint = Checkpoint::open(&dir.path().join("dense")).unwrap();
    (dir, checkpoint)
}

pub fn options() -> ConvertOptions {
    ConvertOptions {
        expert_widths: WIDTHS.to_vec(),
        separate_shells: 0,
        router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 5, compensation: true },
        seed: 3,
        sensitivity: 0.9,
        force: false,
        max_shard_bytes: None,
    }
}

pub fn calibration(source: &Checkpoint) -> Calibration {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut layer = || LayerStatistics {
        importance: (0..WIDTH).map(|_| rng.random_range(0.0..1.0)).collect(),
        mean_activation: (0..WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect(),
    };
    Calibration {
        layers: (0..LAYERS).map(|_| layer()).collect(),
        tokens: 100,
        fingerprint: source.fingerprint().unwrap(),
    }
}

/// The whole chain of messages of an error.
pub fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => format!("{error:#}"),
    }
}

pub fn assert_says<T>(result: anyhow::Result<T>, words: &[&str]) {
    let message = message(result);
    for word in words {
        assert!(message.contains(word), "{word:?} not in: {message}");
    }
}

/// No finished and no partial output.
pub fn assert_nothing_written(dir: &Path, before: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(contents(dir).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
}

/// The neurons of a layer: gate row, up row and down column, as bits.
pub fn neurons(checkpoint: &Checkpoint, layer: usize) -> Vec<Vec<u32>> {
    let read = |name| values(checkpoint, &tensors::full_name(layer, name));
    let (gate, up, down) = (read(tensors::GATE_PROJ), read(tensors::UP_PROJ), read(tensors::DOWN_PROJ));
    let neuron = |j: usize| {
        let rows = gate[j * HIDDEN..(j + 1) * HIDDEN].iter().chain(&up[j * HIDDEN..(j + 1) * HIDDEN]);
        rows.chain((0..HIDDEN).map(|d| &down[d * WIDTH + j])).map(|v| v.to_bits()).collect()
    };
    (0..WIDTH).map(neuron).collect()
}

/// A layer's dense FFN in f64: `W_down (silu(W_gate x) ∘ (W_up x))`.
pub fn ffn(checkpoint: &Checkpoint, layer: usize, x: &[f64]) -> Vec<f64> {
    let floats = |bits: &[u32]| bits.iter().map(|&b| f64::from(f32::from_bits(b))).collect::<Vec<f64>>();
    let dot = |w: &[f64]| w.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
    let mut y = vec![0.0; HIDDEN];
    for neuron in neurons(checkpoint, layer) {
        let w = floats(&neuron);
        let g = dot(&w[..HIDDEN]);
        let h = g / (1.0 + (-g).exp()) * dot(&w[HIDDEN..2 * HIDDEN]);
        y.iter_mut().zip(&w[2 * HIDDEN..]).for_each(|(y, w)| *y += w * h);
    }
    y
}

// ---- broken files ----

/// Opens a dense checkpoint after `damage` to its config.json.
pub fn open_with_config(damage: impl Fn(&mut Value)) -> anyhow::Result<Checkpoint> {
    let dir = TempDir::new().unwrap();
    let mut config = support::config("LlamaForCausalLM");
    support::write(dir.path(), &config, Dtype::F32, 1);
    damage(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir.path())
}

/// Opens a dense checkpoint whose safetensors file went through `damage`.
pub fn open_with_file(damage: impl Fn(Vec<u8>) -> Vec<u8>) -> anyhow::Result<Checkpoint> {
    let dir = TempDir::new().unwrap();
    support::write(dir.path(), &support::config("LlamaForCausalLM"), Dtype::F32, 1);
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, damage(std::fs::read(&path).unwrap())).unwrap();
    Checkpoint::open(dir.path())
}

/// As [`open_with_file`], for damage to the header alone.
pub fn open_with_header(damage: impl Fn(&mut Value)) -> anyhow::Result<Checkpoint> {
    open_with_file(|bytes| {
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        damage(&mut header);
        let text = header.to_string();
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + len..]].concat()
    })
}

/// Opens a checkpoint whose tensors have other names.
pub fn open_renamed(
    architecture: &str,
    name: impl Fn(&str) -> String,
) -> (TempDir, anyhow::Result<Checkpoint>) {
    let (dir, source) = scratch(architecture, Dtype::F32, 1);
    rewrite(&source, |old, bytes| vec![(name(old), bytes)]);
    let opened = Checkpoint::open(source.dir());
    (dir, opened)
}

/// Writes the weights of `source` anew: `change` makes the tensors of each one's name and bytes.
pub fn rewrite(source: &Checkpoint, change: impl Fn(&str, Vec<u8>) -> Vec<(String, Vec<u8>)>) {
    let mut tensors = Vec::new();
    for name in source.names() {
        let info = source.info(name).unwrap();
        for (name, bytes) in change(name, source.read_bytes(name).unwrap()) {
            tensors.push((name, info.dtype, info.shape.clone(), bytes));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &source.dir().join("model.safetensors")).unwrap();
}

/// Writes the dense model of a DynaMoE checkpoint.
pub fn export_dense(source: &Checkpoint, out: &Path) -> anyhow::Result<()> {
    export(source, &ExportOptions { dense: true, ..ExportOptions::default() }, out, &mut |_, _| {})
}

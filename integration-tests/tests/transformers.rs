//! Hugging Face's transformers computes what the trainer computes, by the code that checkpoints carry.
//!
//! Skipped, with a line that says so, where there is no Python with torch and transformers. `DYNAMOE_PYTHON` names the
//! program (python3).

mod support;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use candle_core::{Device, Tensor};
use dynamoe::Dial;
use dynamoe_model::{Checkpoint, RoutedModel, transformers};
use moefy_train::evaluate::Setting;
use serde_json::{Value, json};
use support::{
    ARCHITECTURES, Checkpoints, SMALL, Shape, checkpoints, edit_json, largest_difference, numbers,
};

const TOLERANCE: f32 = 1e-4;

fn python() -> Option<PathBuf> {
    let program = std::env::var_os("DYNAMOE_PYTHON").unwrap_or_else(|| "python3".into());
    let found = Command::new(&program)
        .args(["-c", "import torch, transformers"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        println!(
            "skipped: {} has no torch and transformers; DYNAMOE_PYTHON names another",
            program.display()
        );
    }
    found.then(|| program.into())
}

/// A checkpoint with the code, as the trainer writes it.
fn with_code(architecture: &str, shape: Shape, seed: u64) -> Checkpoints {
    let checkpoints = checkpoints(architecture, shape, seed);
    transformers::write_code(Path::new(&checkpoints.dynamoe())).unwrap();
    edit_json(&checkpoints.dynamoe(), "config.json", |config| config["auto_map"] = transformers::auto_map());
    checkpoints
}

fn dials() -> Vec<Dial> {
    let sensitivities = [0.0, 0.35, 0.5, 0.6, 1.0].map(Dial::Sensitivity);
    let budgets = [0.2, 0.4, 0.6, 0.75, 0.9, 1.0].map(Dial::Budget);
    sensitivities.into_iter().chain(budgets).collect()
}

fn job(folder: &str, tokens: &[u32]) -> Value {
    let dials: Vec<Value> = dials()
        .into_iter()
        .map(|dial| match dial {
            Dial::Sensitivity(sensitivity) => json!({"sensitivity": sensitivity}),
            Dial::Budget(budget) => json!({"budget": budget}),
        })
        .collect();
    json!({"folder": folder, "tokens": tokens, "dials": dials})
}

#[test]
fn logits_are_the_trainers_at_every_dial() {
    let Some(python) = python() else { return };
    let seed = rand::random::<u64>() >> 1;
    println!("seed {seed}");
    let separate = Shape { separate_shells: 2, ..SMALL };
    let models: Vec<Checkpoints> = ARCHITECTURES
        .iter()
        .flat_map(|architecture| [(architecture, SMALL), (architecture, separate)])
        .map(|(architecture, shape)| with_code(architecture, shape, seed))
        .collect();
    let tokens: Vec<u32> = "The quick brown fox".bytes().map(u32::from).collect();
    let jobs: Vec<String> = models.iter().map(|model| job(&model.dynamoe(), &tokens).to_string()).collect();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transformers_logits.py");
    let modules = tempfile::tempdir().unwrap();
    let mut process = Command::new(python)
        .arg(script)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_MODULES_CACHE", modules.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdin.take().unwrap().write_all(jobs.join("\n").as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    let answers = String::from_utf8(output.stdout).unwrap();
    assert_eq!(answers.lines().count(), models.len());

    for (model, answer) in models.iter().zip(answers.lines()) {
        let answer: Value = serde_json::from_str(answer).unwrap();
        let ours =
            RoutedModel::load(&Checkpoint::open(Path::new(&model.dynamoe())).unwrap(), &Device::Cpu).unwrap();
        let input = Tensor::new(tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let mut widths = Vec::new();
        for (n, dial) in dials().into_iter().enumerate() {
            let setting = Setting::of(dial, &ours).unwrap();
            let (hidden, _) = ours.forward(&input, &setting.sensitivity).unwrap();
            let expected = numbers(&ours.logits(&hidden).unwrap());
            let found: Vec<f32> = answer["logits"][n]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|row| row.as_array().unwrap())
                .map(|logit| logit.as_f64().unwrap() as f32)
                .collect();
            assert_eq!(found.len(), expected.len());
            let difference = largest_difference(&found, &expected);
            assert!(difference < TOLERANCE, "{}, {dial:?}: logits differ by {difference}", model.dynamoe());
            widths.push(answer["widths"][n].as_f64().unwrap());
        }
        assert_eq!((widths[0], widths[4]), (0.25, 1.0));
        assert!(widths[2] > 0.25 && widths[2] < 1.0, "the dial has no effect: {widths:?}");
        assert!(answer["generated"].as_u64().unwrap() > 0);
        let trained = answer["trained"].as_array().unwrap();
        assert!(trained.iter().any(|name| name == "model.layers.0.mlp.gate_proj.weight"), "{trained:?}");
    }
}

//! The token that ends a document: a model that writes it and one that writes another are told apart, and go on so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dynamoe_model::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save_tensors};
use dynamoe_model::tensors::expected_tensors;
use dynamoe_model::{ModelConfig, RoutedModel};
use moefy_train::data::{DataSource, Framing, Scope, TextOptions, Texts, corpus};
use moefy_train::evaluate::{Policy, score};
use moefy_train::pipeline::run::{PlannedRun, ReportOptions};
use moefy_train::pipeline::{Existing, HeldOut, Inputs, Lab, Recipe, RunFolder};
use moefy_train::progress::Progress;
use moefy_train::ranks::Alone;
use moefy_train::train::{Outcome, Stop, TrainConfig};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

/// BOS of the demo's base, which ends documents with it, and a token that no text holds (the byte 255).
const BOS: u32 = 0;
const EOS: u32 = 188;

/// The demo's base in `base`; in `swapped`, the same function but that it ends documents with [`EOS`]. The config.json of both
/// names both tokens, as those of most Llamas do.
struct Models {
    dir: TempDir,
    text: PathBuf,
}

impl Models {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/base");
        let source = Checkpoint::open(&from).unwrap();
        let read = |(name, shape): (String, Vec<usize>)| {
            let tensor = source.tensor(&name, &shape, DType::F32, &Device::Cpu).unwrap();
            (name, tensor)
        };
        let tensors: BTreeMap<String, Tensor> =
            expected_tensors(source.config()).into_iter().map(read).collect();
        let mut config = source.json().clone();
        config["eos_token_id"] = EOS.into();
        for name in ["base", "swapped"] {
            let (to, mut tensors) = (dir.path().join(name), tensors.clone());
            if name == "swapped" {
                config["tie_word_embeddings"] = false.into();
                tensors.insert("lm_head.weight".into(), swapped(&tensors["model.embed_tokens.weight"]));
            }
            std::fs::create_dir(&to).unwrap();
            save_tensors(&to, &tensors, |_| Dtype::F32, DEFAULT_SHARD_BYTES).unwrap();
            std::fs::write(to.join("config.json"), config.to_string()).unwrap();
            std::fs::copy(from.join("tokenizer.json"), to.join("tokenizer.json")).unwrap();
        }
        let text = dir.path().join("text.txt");
        std::fs::write(&text, corpus::documents(77, 60).join("<|endoftext|>")).unwrap();
        Self { dir, text }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn options(&self) -> TextOptions {
        TextOptions { cache_dir: Some(self.path("cache")), ..TextOptions::default() }
    }

    fn texts(&self, name: &str) -> Texts {
        Texts::open(&Checkpoint::open(&self.path(name)).unwrap(), &self.options()).unwrap()
    }

    fn source(&self) -> DataSource {
        DataSource::local(&self.text)
    }

    fn loss(&self, name: &str, scope: Scope) -> f64 {
        let model = RoutedModel::load(&Checkpoint::open(&self.path(name)).unwrap(), &Device::Cpu).unwrap();
        let batches = self.texts(name).scored(&[self.source()], scope).unwrap();
        score(&model, &batches, &Policy::Dial(&[1.0; 4]), &Progress::hidden(), &Alone).unwrap().loss
    }

    /// The mean probabilities of [`BOS`] and [`EOS`] after whole documents.
    fn at_the_end(&self, name: &str) -> [f64; 2] {
        let model = RoutedModel::load(&Checkpoint::open(&self.path(name)).unwrap(), &Device::Cpu).unwrap();
        let cache = self.texts(name).tokens(&self.source()).unwrap();
        let mut sums = [0.0; 2];
        for document in 0..cache.documents() {
            let mut tokens = cache.framed(document);
            tokens.pop();
            let length = tokens.len();
            let tokens = Tensor::from_vec(tokens, (1, length), &Device::Cpu).unwrap();
            let (hidden, _) = model.forward(&tokens, &[1.0; 4]).unwrap();
            let logits = model.logits(&hidden.narrow(0, length - 1, 1).unwrap()).unwrap();
            let row = candle_nn::ops::softmax_last_dim(&logits).unwrap().to_vec2::<f32>().unwrap();
            for (sum, id) in sums.iter_mut().zip([BOS, EOS]) {
                *sum += f64::from(row[0][id as usize]) / cache.documents() as f64;
            }
        }
        sums
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.path(name).join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    }
}

/// The output matrix with the rows of [`BOS`] and [`EOS`] exchanged.
fn swapped(embedding: &Tensor) -> Tensor {
    let mut rows: Vec<u32> = (0..embedding.dim(0).unwrap() as u32).collect();
    rows.swap(BOS as usize, EOS as usize);
    embedding.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap()
}

#[test]
fn a_model_is_asked_which_token_ends_its_documents() {
    let models = Models::new();
    let framing = |name: &str| models.texts(name).framing();
    assert_eq!(framing("base"), Framing { opening: BOS, closing: BOS });
    assert_eq!(framing("swapped"), Framing { opening: BOS, closing: EOS });
    // in whatever place the token is named
    models.change("swapped", |config| config["eos_token_id"] = json!([5, 6]));
    std::fs::write(models.path("swapped/generation_config.json"), json!({"eos_token_id": [EOS]}).to_string())
        .unwrap();
    assert_eq!(framing("swapped").closing, EOS);
    // what training wrote down holds
    models.change("swapped", |config| config["closing_token_id"] = 6.into());
    assert_eq!(framing("swapped").closing, 6);
    models.change("swapped", |config| config["closing_token_id"] = 768.into());
    let texts = Texts::open(&Checkpoint::open(&models.path("swapped")).unwrap(), &models.options());
    assert!(format!("{:#}", texts.err().unwrap()).contains("\"closing_token_id\" 768 lies beyond"));
}

#[test]
fn the_same_function_has_the_same_loss_whatever_ends_its_documents() {
    let models = Models::new();
    let loss = |name: &str| models.loss(name, Scope::Documents(512));
    let (base, swapped) = (loss("base"), loss("swapped"));
    assert!((base - swapped).abs() < 1e-5 * base, "{base} {swapped}");
    // packed, the swapped model also reads the token that ended the document before, which it never has
    let loss = |name: &str| models.loss(name, Scope::Packed(256));
    let (base, swapped) = (loss("base"), loss("swapped"));
    assert!((base - swapped).abs() < 0.02 * base, "{base} {swapped}");
}

/// Without distillation nothing but the text teaches the model to stop.
#[test]
fn a_trained_model_still_ends_its_documents() {
    let models = Models::new();
    let [bos, eos] = models.at_the_end("swapped");
    assert!(eos > 0.5 && bos < 1e-3, "before training: {bos} {eos}");
    let stop = Stop::default();
    let inputs = Inputs {
        model: models.path("swapped").display().to_string(),
        tokenizer: None,
        data: vec![models.source()],
        held_out: HeldOut::Tail,
        text: models.options(),
    };
    let train = TrainConfig {
        tokens: 40 * 512,
        batch_size: 4,
        sequence_length: 128,
        distill: 0.0,
        ..TrainConfig::default()
    };
    let options = ReportOptions { baselines: vec![], oracle: false, eval_tokens: 2000, pairs: None };
    let lab = Lab::open(inputs, &Device::Cpu, &stop, &Alone).unwrap();
    let planned = PlannedRun::new(lab, Recipe { train, ..Recipe::default() }, options).unwrap();
    let settings = planned.settings().unwrap();
    let run = planned.read().unwrap();
    assert_eq!(settings["closing-token"], EOS);
    let folder =
        RunFolder::prepare(&models.path("out"), Existing::default(), &[], &settings, &Alone).unwrap();
    assert_eq!(run.run(&folder).unwrap(), Outcome::Finished);
    let [bos, eos] = models.at_the_end("out");
    assert!(eos > 0.5 && bos < 0.01, "after training: {bos} {eos}");
    assert_eq!(ModelConfig::read(&models.path("out")).unwrap().closing_token_id, Some(EOS));
    assert_eq!(models.texts("out").framing(), Framing { opening: BOS, closing: EOS });
}

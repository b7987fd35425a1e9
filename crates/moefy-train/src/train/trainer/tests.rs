use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use candle_core::Var;
use dynamoe_model::ModelConfig;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::data::corpus::{BOUNDARY, documents, train_tokenizer};
use crate::data::{BatchesConfig, DataSource, Framing, Split, TextFormat, TokenCache, WeightedCache};
use crate::methods::Method;
use crate::prepare::ExpertConfig;
use crate::ranks::threads::run;
use crate::testing::{normal, seed};
use crate::train::{Trained, Tuning};

/// A model with random weights, and text.
struct Lab {
    dir: TempDir,
    seed: u64,
    config: ModelConfig,
    cache: Arc<TokenCache>,
}

/// All that a rank knows after a training: how it ended, and the bits of its weights.
#[derive(Debug, PartialEq)]
struct Trace {
    outcome: Outcome,
    weights: BTreeMap<String, Vec<u32>>,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let documents = documents(1, 20);
        let path = dir.path().join("text.txt");
        fs::write(&path, documents.join(&format!("\n{BOUNDARY}\n"))).unwrap();
        let tokenizer = train_tokenizer(&documents, 300).unwrap();
        let json = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 24,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": tokenizer.get_vocab_size(true),
            "tie_word_embeddings": true,
        });
        let dense = ModelConfig::from_json(&json).unwrap();
        let section = ExpertConfig::default().options(&dense, 0).unwrap().section(&dense);
        let config = ModelConfig { dynamoe: Some(section), ..dense };
        let source = DataSource::local(path);
        let cache_dir = dir.path().join("cache");
        let (format, framing) = (TextFormat::default(), Framing { opening: 0, closing: 0 });
        let cache = TokenCache::open_or_build(&source, &format, &tokenizer, framing, &cache_dir, &|_, _| {});
        Self { dir, seed: seed(), config, cache: Arc::new(cache.unwrap()) }
    }

    /// Trains on `size` ranks. `stop` says which rank was asked to stop before the first step.
    fn train(&self, train: &TrainConfig, size: usize, dir: Option<&str>, stop: Option<usize>) -> Vec<Trace> {
        self.try_train(train, size, dir, stop).into_iter().map(Result::unwrap).collect()
    }

    fn try_train(
        &self,
        train: &TrainConfig,
        size: usize,
        dir: Option<&str>,
        stop: Option<usize>,
    ) -> Vec<Result<Trace>> {
        let state_dir = dir.map(|dir| self.dir.path().join(dir));
        let of_rank = |ranks: &dyn Ranks| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            let mut get = |_: &str, shape: &[usize]| Ok(normal(&mut rng, 0.1, shape));
            let model = TrainModel::new(&self.config, train, &mut get).unwrap();
            let cache = WeightedCache { cache: self.cache.clone(), weight: 1.0 };
            let shape = BatchesConfig {
                sequence_length: train.sequence_length,
                batch_size: train.micro_batch(),
                seed: train.seed,
                split: Split::All,
            };
            let asked = Stop::default();
            if stop == Some(ranks.rank()) {
                asked.ask();
            }
            let trainer = Trainer {
                config: train,
                model: &model,
                batches: &Batches::new(vec![cache], shape).unwrap(),
                teacher: train.has_teacher().then_some(Teacher::Itself),
                state_dir: state_dir.as_deref(),
                events: None,
                fingerprint: "a model",
                stop: &asked,
                label: "",
                ranks,
            };
            let (outcome, _) = trainer.run()?;
            let bits = |(name, var): (&str, &Var)| {
                let values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
                (name.to_owned(), values.into_iter().map(f32::to_bits).collect())
            };
            Ok(Trace { outcome, weights: model.params().iter().map(bits).collect() })
        };
        run(size, of_rank)
    }

    fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.dir.path().join(path)).unwrap()
    }
}

/// Six batches of one sequence in each of five steps.
fn train(method: Method, trained: Trained) -> TrainConfig {
    TrainConfig {
        method,
        train: trained,
        tokens: 5 * 6 * 16,
        batch_size: 6,
        micro_batch: Some(1),
        sequence_length: 16,
        lr: 0.01,
        tuning: Tuning { log_every: 1, ..Tuning::default() },
        ..TrainConfig::default()
    }
}

#[test]
fn a_training_is_the_same_bits_on_any_number_of_ranks() {
    let lab = Lab::new();
    for config in [
        train(Method::Priced, Trained::All),
        train(Method::Priced, Trained::Added),
        TrainConfig { micro_batch: Some(2), recompute: true, ..train(Method::Similarity, Trained::All) },
        train(Method::Random, Trained::All),
    ] {
        let [expected] = &lab.train(&config, 1, None, None)[..] else { panic!("one rank") };
        assert_eq!(expected.outcome, Outcome::Finished);
        let most = config.accumulation();
        for size in [2, 3, 4, 6].into_iter().filter(|&size| size <= most) {
            let found = lab.train(&config, size, None, None);
            assert!(
                found.iter().all(|trace| trace == expected),
                "{size} ranks, {:?}, {:?}",
                config.method,
                config.train
            );
        }
    }
}

#[test]
fn a_training_is_resumed_on_another_number_of_ranks() {
    let lab = Lab::new();
    let config = train(Method::Priced, Trained::All);
    let [expected] = &lab.train(&config, 1, Some("whole"), None)[..] else { panic!("one rank") };
    // whichever rank is asked to stop, all stop after the same step
    for (step, (size, asked)) in [(2, 1), (1, 0), (3, 2), (2, 0)].into_iter().enumerate() {
        let found = lab.train(&config, size, Some("parts"), Some(asked));
        assert!(found.iter().all(|trace| trace.outcome == Outcome::Stopped(step as u64 + 1)));
        assert!(found.iter().all(|trace| trace.weights == found[0].weights));
    }
    let found = lab.train(&config, 4, Some("parts"), None);
    assert!(found.iter().all(|trace| trace == expected));
    for file in ["params.safetensors", "moments.safetensors", "state.json"] {
        let [whole, parts] = ["whole", "parts"].map(|dir| lab.read(&format!("{dir}/step-00000005/{file}")));
        assert!(whole == parts, "{file}");
    }
    // the log too, but for the speed
    let log = |dir: &str| -> Vec<TrainMetrics> {
        let text = String::from_utf8(lab.read(&format!("{dir}/metrics.jsonl"))).unwrap();
        let line = |line| TrainMetrics { tokens_per_second: 0.0, ..serde_json::from_str(line).unwrap() };
        text.lines().map(line).collect()
    };
    assert!(log("whole") == log("parts") && log("whole").len() == 5);
}

#[test]
fn ranks_without_work_are_refused() {
    let lab = Lab::new();
    let config = TrainConfig { micro_batch: Some(3), ..train(Method::Priced, Trained::Added) };
    for result in lab.try_train(&config, 3, None, None) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("3 processes") && error.contains("give --micro-batch 2"), "{error}");
    }
}

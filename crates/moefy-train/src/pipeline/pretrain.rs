//! Training a small dense Llama from scratch: the demo's base, and bases to experiment on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, ensure};
use candle_core::{Device, Tensor};
use dynamoe_model::ModelConfig;
use dynamoe_model::checkpoint::{DEFAULT_SHARD_BYTES, save_tensors};
use dynamoe_model::tensors::expected_tensors;
use rand::Rng;
use rand_distr::StandardNormal;
use serde::Serialize;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::folder::RunFolder;
use super::lab::{HeldOut, Inputs, Lab};
use super::recipe::{Recipe, Start, TrainJob, Training, write_model};
use crate::data::corpus::{self, BOUNDARY};
use crate::data::source::Documents;
use crate::data::{DataSource, TextFormat, TextOptions};
use crate::random::in_step;
use crate::ranks::Ranks;
use crate::train::{Outcome, Stop, TrainConfig};

/// Documents of generated text that a base is trained on.
pub const DOCUMENTS: usize = 12_000;

/// The shape of a model.
#[derive(Debug, Clone, Serialize)]
pub struct Shape {
    /// D
    pub hidden_size: usize,
    /// I
    pub intermediate_size: usize,
    /// L
    pub layers: usize,
    /// H
    pub heads: usize,
    /// K
    pub kv_heads: usize,
    /// V: tokens of the byte-level BPE that is trained on the text.
    pub vocab_size: usize,
    /// Positions.
    pub positions: usize,
    /// Whether the weights are stored as bf16.
    pub bf16: bool,
}

/// A model to be made.
pub struct Pretrain {
    /// Its shape.
    pub shape: Shape,
    /// How it is trained; the method is [`crate::methods::Method::Dense`].
    pub train: TrainConfig,
    /// Text to train on; without any, this program generates it.
    pub data: Vec<DataSource>,
    /// How text is read.
    pub text: TextOptions,
    /// Where TensorBoard reads how the training goes; none for nowhere.
    pub tensorboard: Option<PathBuf>,
}

impl Pretrain {
    /// Checks the shape, says what its training needs in memory, and refuses what the machine does not have.
    ///
    /// # Errors
    /// A shape that contradicts itself; too little memory, with the options that would do.
    pub fn check(&self, device: &Device, ranks: &dyn Ranks) -> Result<()> {
        let shape = &self.shape;
        ensure!(
            shape.heads > 0 && shape.hidden_size.is_multiple_of(shape.heads),
            "--hidden-size {} must be a multiple of --heads {}",
            shape.hidden_size,
            shape.heads
        );
        let config = ModelConfig::from_json(&config_json(shape, shape.vocab_size, 0))?;
        let stored = if shape.bf16 { 2 } else { 4 };
        self.recipe().check_memory(&Start { config: &config, stored, converts: false, device, ranks })
    }

    fn recipe(&self) -> Recipe {
        Recipe { train: self.train.clone(), ..Recipe::default() }
    }

    /// Makes a tokenizer and a random model, trains it and publishes it in `folder`.
    ///
    /// # Errors
    /// Those of [`Pretrain::check`], of the data, of training and of the file system.
    pub fn run(&self, folder: &RunFolder<'_>, device: &Device, stop: &Stop) -> Result<Outcome> {
        let init = folder.training("init");
        let generated = folder.training("generated.txt");
        let data = match &self.data[..] {
            [] => vec![DataSource::local(&generated)],
            given => given.to_vec(),
        };
        folder.ranks().first(|| {
            if init.join("config.json").exists() {
                return Ok(());
            }
            self.prepare(&data, &generated, &init)
        })?;
        let inputs = Inputs {
            model: init.display().to_string(),
            tokenizer: None,
            data,
            held_out: HeldOut::Nothing,
            text: self.text.clone(),
        };
        let tensorboard = self.tensorboard.clone();
        let lab = Lab { tensorboard, ..Lab::open(inputs, device, stop, folder.ranks())? };
        let recipe = self.recipe();
        let job = TrainJob {
            source: &lab.model,
            teacher: None,
            batches: &lab.batches(&recipe.train)?,
            state_dir: &folder.training("state"),
            label: "pretraining",
            name: "pretraining",
        };
        match recipe.train(&lab, &job)? {
            Training::Stopped(step) => Ok(Outcome::Stopped(step)),
            Training::Finished(model, _) => {
                let path = folder.training("final");
                folder.ranks().first(|| {
                    write_model(&lab.model, &model, lab.model.config(), &path)?;
                    folder.publish(&path)
                })?;
                Ok(Outcome::Finished)
            }
        }
    }

    /// Writes a tokenizer of the text and a random model into `init`.
    fn prepare(&self, data: &[DataSource], generated: &Path, init: &Path) -> Result<()> {
        let documents = if self.data.is_empty() {
            let documents = corpus::documents(self.train.seed, DOCUMENTS);
            fs::write(generated, documents.join(&format!("\n{BOUNDARY}\n")))
                .with_context(|| format!("writing {}", generated.display()))?;
            documents
        } else {
            read_documents(data, &self.text.format)?
        };
        let tokenizer = corpus::train_tokenizer(&documents, self.shape.vocab_size)?;
        write_random(&self.shape, &tokenizer, self.train.seed, init).map(drop)
    }
}

fn read_documents(sources: &[DataSource], format: &TextFormat) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for source in sources {
        for file in source.files()? {
            for document in Documents::open(&file, format)? {
                all.push(document?.text);
            }
        }
    }
    Ok(all)
}

/// Writes a Llama with random weights, and its tokenizer.
fn write_random(shape: &Shape, tokenizer: &Tokenizer, seed: u64, dir: &Path) -> Result<PathBuf> {
    let boundary = tokenizer.token_to_id(BOUNDARY);
    let boundary = boundary.with_context(|| format!("the trained tokenizer has no token {BOUNDARY}"))?;
    let config = config_json(shape, tokenizer.get_vocab_size(true), boundary);
    let tensors = random_tensors(&ModelConfig::from_json(&config)?, seed)?;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let dtype = if shape.bf16 { safetensors::Dtype::BF16 } else { safetensors::Dtype::F32 };
    save_tensors(dir, &tensors, |_| dtype, DEFAULT_SHARD_BYTES)?;
    tokenizer.save(dir.join("tokenizer.json"), true).map_err(Error::from_boxed)?;
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOUNDARY,
        "eos_token": BOUNDARY,
        "model_max_length": shape.positions,
    });
    fs::write(dir.join("tokenizer_config.json"), serde_json::to_vec_pretty(&tokenizer_config)?)?;
    // config.json last: with it, the folder counts as complete
    fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    Ok(dir.to_owned())
}

/// The config.json of a Llama.
fn config_json(shape: &Shape, vocab_size: usize, boundary: u32) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size / shape.heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": boundary,
        "eos_token_id": boundary,
        "torch_dtype": if shape.bf16 { "bfloat16" } else { "float32" },
    })
}

/// Matrices are `N(0, 0.02²)`, those that write to the residual stream smaller by `√(2L)`; norms are 1.
fn random_tensors(config: &ModelConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let mut rng = in_step(seed, 0, u64::MAX);
    for (name, dims) in expected_tensors(config) {
        let values: Vec<f32> = if dims.len() == 1 {
            vec![1.0; dims[0]]
        } else {
            let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let scale = if writes { 0.02 / (2.0 * config.num_hidden_layers as f32).sqrt() } else { 0.02 };
            (0..dims.iter().product()).map(|_| scale * rng.sample::<f32, _>(StandardNormal)).collect()
        };
        tensors.insert(name, Tensor::from_vec(values, dims, &Device::Cpu)?);
    }
    Ok(tensors)
}

//! Training a small dense Llama from scratch: the demo's base, and bases to experiment on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Error, Result, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use rand::Rng;
use rand_distr::StandardNormal;
use serde::Serialize;
use serde_json::json;
use tokenizers::Tokenizer;

use crate::data::source::Documents;
use crate::data::{DataSource, Split, TextFormat};
use crate::demo::corpus::{self, BOUNDARY};
use crate::run::RunFolder;
use crate::texts::{TextArgs, Texts};
use crate::train::step::rng;
use crate::train::{Outcome, TrainConfig, TrainModel, Trainer};
use dynamoe_model::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, save_model, save_tensors};
use dynamoe_model::config::ModelConfig;
use dynamoe_model::tensors::expected_tensors;

/// Documents of generated text that a base is trained on.
pub const DOCUMENTS: usize = 12_000;

/// The shape of a model.
#[derive(Debug, Clone, Args, Serialize)]
pub struct Pretrain {
    /// D
    #[arg(long, default_value_t = 64)]
    pub hidden_size: usize,
    /// I
    #[arg(long, default_value_t = 192)]
    pub intermediate_size: usize,
    /// L
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// H
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// K
    #[arg(long, default_value_t = 2)]
    pub kv_heads: usize,
    /// V: tokens of the byte-level BPE that is trained on the text
    #[arg(long, default_value_t = 768)]
    pub vocab_size: usize,
    /// Positions
    #[arg(long, default_value_t = 512)]
    pub positions: usize,
    /// Store the weights as bf16
    #[arg(long)]
    pub bf16: bool,
}

/// Makes a tokenizer and a random model, trains it and publishes it in `folder`.
///
/// # Errors
/// A shape that contradicts itself; those of the data, of training and of the file system.
pub fn pretrain(
    shape: &Pretrain,
    train: &TrainConfig,
    data: &[DataSource],
    text: &TextArgs,
    folder: &RunFolder,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let init = folder.training("init");
    let generated = folder.training("generated.txt");
    let sources = match data {
        [] => vec![DataSource { path: generated.clone(), weight: 1.0 }],
        given => given.to_vec(),
    };
    if !init.join("config.json").exists() {
        let format = TextFormat { marker: text.marker.clone(), field: text.field.clone() };
        let documents = if data.is_empty() {
            let documents = corpus::documents(train.seed, DOCUMENTS);
            fs::write(&generated, documents.join(&format!("\n{BOUNDARY}\n")))
                .with_context(|| format!("writing {}", generated.display()))?;
            documents
        } else {
            read_documents(&sources, &format)?
        };
        let tokenizer = corpus::train_tokenizer(&documents, shape.vocab_size)?;
        write_random(shape, &tokenizer, train.seed, &init)?;
    }
    let source = Checkpoint::open(&init)?;
    let texts = Texts::open(&init, source.config(), text)?;
    let batch = (train.batch_size, train.sequence_length);
    let batches = texts.training(&sources, Split::All, batch, train.seed)?;
    let model = TrainModel::new(source.config(), train, &mut |name, shape| {
        source.tensor(name, shape, DType::F32, device)
    })?;
    let (outcome, _) = Trainer {
        config: train,
        model: &model,
        batches: &batches,
        teacher: None,
        state_dir: Some(&folder.training("state")),
        fingerprint: &source.fingerprint()?,
        stop,
        label: "pretraining",
    }
    .run()?;
    if outcome == Outcome::Finished {
        let weights = model
            .params()
            .iter()
            .map(|(name, var)| Ok((name.to_owned(), var.as_detached_tensor().to_device(&Device::Cpu)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let path = folder.training("final");
        save_model(&source, &weights, None, &path, path.exists())?;
        folder.publish(&path)?;
    }
    Ok(outcome)
}

fn read_documents(sources: &[DataSource], format: &TextFormat) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for source in sources {
        for document in Documents::open(&source.path, format)? {
            all.push(document?);
        }
    }
    Ok(all)
}

/// A Llama with random weights: matrices `N(0, 0.02²)`, those that write to the residual stream smaller by
/// `√(2L)`, norms 1.
fn write_random(shape: &Pretrain, tokenizer: &Tokenizer, seed: u64, dir: &Path) -> Result<PathBuf> {
    ensure!(
        shape.heads > 0 && shape.hidden_size.is_multiple_of(shape.heads),
        "--hidden-size {} must be a multiple of --heads {}",
        shape.hidden_size,
        shape.heads
    );
    let boundary = tokenizer
        .token_to_id(BOUNDARY)
        .with_context(|| format!("the trained tokenizer has no token {BOUNDARY}"))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size / shape.heads,
        "vocab_size": tokenizer.get_vocab_size(true),
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
    });
    let parsed = ModelConfig::from_json(&config)?;
    let mut tensors = BTreeMap::new();
    let mut rng = rng(seed, 0, u64::MAX);
    for (name, dims) in expected_tensors(&parsed) {
        let values: Vec<f32> = if dims.len() == 1 {
            vec![1.0; dims[0]]
        } else {
            let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let scale = if writes { 0.02 / (2.0 * shape.layers as f32).sqrt() } else { 0.02 };
            (0..dims.iter().product()).map(|_| scale * rng.sample::<f32, _>(StandardNormal)).collect()
        };
        tensors.insert(name, Tensor::from_vec(values, dims, &Device::Cpu)?);
    }
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

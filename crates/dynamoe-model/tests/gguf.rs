//! GGUF files: what they say is what the folders say that they were made of.

#[path = "support/gguf.rs"]
mod support;

use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor, safetensors};
use dynamoe_model::checkpoint::save_tensors;
use dynamoe_model::config::Architecture;
use dynamoe_model::tensors::expected_tensors;
use dynamoe_model::{Checkpoint, ModelConfig, RoutedModel, gguf};
use gguf_file::Value;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use support::{Made, read, text};
use tempfile::TempDir;

/// Models whose logits transformers has computed.
const FIXTURES: [&str; 14] = [
    "llama",
    "llama-attention-bias",
    "llama-bf16",
    "llama-f16",
    "llama-head-dim",
    "llama-linear-rope",
    "llama3-rope-tied",
    "mistral-linear-rope",
    "mistral-window",
    "qwen2-linear-rope",
    "qwen2-tied",
    "qwen2-yarn",
    "qwen3",
    "qwen3-attention-bias",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A byte for each token.
fn tokenizer(tokens: usize) -> serde_json::Value {
    let vocab: serde_json::Map<_, _> = (0..tokens).map(|id| (format!("t{id}"), id.into())).collect();
    json!({ "added_tokens": [{ "id": 1 }, { "id": 2 }], "model": { "vocab": vocab, "merges": [["t", "1"]] } })
}

fn made(source: &Checkpoint, kind: GgmlDType) -> Made {
    let mut made = Made::of(source, kind);
    made.tokenizer(&tokenizer(source.config().vocab_size), "gpt-2");
    made
}

/// The folder of a file in the making.
fn converted(dir: &TempDir, made: &Made) -> anyhow::Result<Checkpoint> {
    let file = dir.path().join("model.gguf");
    made.write(&file);
    let out = dir.path().join("out");
    let _ = std::fs::remove_dir_all(&out);
    gguf::convert(&file, None, &out)?;
    Checkpoint::open(&out)
}

#[track_caller]
fn refused(dir: &TempDir, made: &Made, words: &[&str]) {
    let error = format!("{:#}", converted(dir, made).err().expect("an error"));
    words.iter().for_each(|word| assert!(error.contains(word), "expected {word:?} in {error}"));
    assert!(!dir.path().join("out").exists());
}

#[test]
fn a_file_computes_what_transformers_computes_for_the_folder_that_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    for name in FIXTURES {
        let source = Checkpoint::open(&fixture(name)).unwrap();
        let model = converted(&dir, &made(&source, GgmlDType::F32)).unwrap();
        let expected = safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu).unwrap();
        let routed = RoutedModel::load(&model, &Device::Cpu).unwrap();
        let tokens = expected["input_ids"].to_dtype(DType::U32).unwrap();
        let (hidden, _) = routed.forward(&tokens, &[1.0; 2]).unwrap();
        let logits = routed.logits(&hidden).unwrap().reshape(expected["logits"].shape()).unwrap();
        let difference = (logits - &expected["logits"]).unwrap().abs().unwrap().flatten_all().unwrap();
        let difference = difference.max(0).unwrap().to_scalar::<f32>().unwrap();
        // as in the parity tests: two layers of f32 sums in another order
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
        let (ours, theirs) = (model.config(), source.config());
        assert_eq!(ours.tie_word_embeddings, theirs.tie_word_embeddings, "{name}");
        assert_eq!(ours.max_position_embeddings, theirs.max_position_embeddings, "{name}");
        assert_eq!(
            (ours.bos_token_id, &ours.eos_token_ids),
            (theirs.bos_token_id, &theirs.eos_token_ids),
            "{name}"
        );
    }
}

/// A random model whose rows are as long as every type's blocks allow.
fn wide(dir: &Path, architecture: &str) -> Checkpoint {
    let model_type = architecture.trim_end_matches("ForCausalLM").to_lowercase();
    let config = json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": null, "eos_token_id": 2,
    });
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = std::collections::BTreeMap::new();
    for (seed, (name, shape)) in
        expected_tensors(&ModelConfig::from_json(&config).unwrap()).into_iter().enumerate()
    {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    }
    save_tensors(dir, &tensors, |_| ::safetensors::Dtype::F32, u64::MAX).unwrap();
    Checkpoint::open(dir).unwrap()
}

#[test]
fn every_type_is_dequantized_and_put_into_order() {
    let kinds = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    let dir = tempfile::tempdir().unwrap();
    for architecture in [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3]
    {
        let source = wide(&dir.path().join(architecture.name()), architecture.name());
        for kind in kinds {
            let model = converted(&dir, &made(&source, kind)).unwrap();
            let dtype = match kind {
                GgmlDType::F32 => DType::F32,
                GgmlDType::F16 => DType::F16,
                _ => DType::BF16,
            };
            for name in source.names() {
                let tensor = read(&source, name);
                let expected = match tensor.rank() {
                    1 => tensor,
                    _ => {
                        let blocks = QTensor::quantize(&tensor, kind).unwrap();
                        let rounded = blocks.dequantize(&Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                        rounded.to_dtype(DType::F32).unwrap()
                    }
                };
                let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (found, expected) = (numbers(&read(&model, name)), numbers(&expected));
                let other = found.iter().zip(&expected).position(|(found, expected)| found != expected);
                let values = other.map(|at| (at, found[at], expected[at]));
                assert_eq!(values, None, "{} {kind:?} {name}", architecture.name());
            }
            assert_eq!(model.names().count(), source.names().count());
        }
    }
}

#[test]
fn a_file_that_is_not_what_it_should_be_is_refused_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("llama")).unwrap();
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = made(&source, GgmlDType::F32);
        change(&mut made);
        made
    };
    let set = |key: &'static str, value: Value| {
        with(&|made| {
            made.metadata.insert(key.to_owned(), value.clone());
        })
    };
    for other in ["mamba", "gemma3", "granite", "smollm3"] {
        let model = set("general.architecture", text(other));
        refused(&dir, &model, &["model.gguf", &format!("{other:?}"), "llama, qwen2, qwen3", "safetensors"]);
    }
    refused(&dir, &set("split.count", Value::U16(3)), &["one of 3 files", "--merge"]);
    refused(&dir, &set("llama.expert_count", Value::U32(8)), &["llama.expert_count is 8"]);
    refused(&dir, &set("llama.rope.dimension_count", Value::U32(2)), &["rope.dimension_count", "4", "2"]);
    refused(&dir, &set("llama.rope.scaling.type", text("longrope")), &["longrope", "linear, yarn"]);
    refused(&dir, &set("llama.rope.scaling.yarn_ext_factor", Value::F32(2.0)), &["yarn_ext_factor"]);
    refused(&dir, &set("llama.block_count", text("two")), &["llama.block_count", "a whole number", "two"]);
    refused(&dir, &set("llama.block_count", Value::U32(1)), &["blk.1.", "another one"]);
    refused(&dir, &set("llama.feed_forward_length", Value::U32(8)), &["ffn_gate", "[8, 16]", "[24, 16]"]);
    for (key, word) in [("tokenizer.ggml.pre", "llama-bpe"), ("tokenizer.ggml.model", "gpt2")] {
        refused(&dir, &set(key, text("unheard-of")), &[key, word, "unheard-of", "--tokenizer"]);
    }
    let without = |key: &'static str| {
        with(&|made| {
            made.metadata.remove(key);
            made.tensors.remove(key);
        })
    };
    refused(&dir, &without("blk.1.attn_k.weight"), &["blk.1.attn_k.weight", "missing"]);
    refused(&dir, &without("token_embd.weight"), &["token_embd.weight", "missing"]);
    refused(&dir, &without("llama.embedding_length"), &["llama.embedding_length", "missing"]);
    refused(&dir, &without("tokenizer.ggml.tokens"), &["no tokens", "--tokenizer"]);
    refused(&dir, &without("tokenizer.ggml.merges"), &["tokenizer.ggml.merges", "--tokenizer"]);
    let more = with(&|made| {
        let sinks = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        made.tensors
            .insert("blk.0.attn_sinks.weight".into(), QTensor::quantize(&sinks, GgmlDType::F32).unwrap());
    });
    refused(&dir, &more, &["blk.0.attn_sinks.weight", "none of a LlamaForCausalLM's"]);
    let infinite = with(&|made| {
        let tensor = Tensor::full(f32::INFINITY, 16, &Device::Cpu).unwrap();
        made.tensors.insert("output_norm.weight".into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
    });
    refused(&dir, &infinite, &["model.norm.weight", "infinite"]);
    let other = with(&|made| {
        let factors = Tensor::new(&[1f32, 3.0], &Device::Cpu).unwrap();
        made.tensors.insert("rope_freqs.weight".into(), QTensor::quantize(&factors, GgmlDType::F32).unwrap());
    });
    refused(&dir, &other, &["rope_freqs.weight", "Llama 3"]);
}

#[test]
fn a_file_that_is_cut_off_or_damaged_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("qwen3")).unwrap();
    let (file, out) = (dir.path().join("model.gguf"), dir.path().join("out"));
    made(&source, GgmlDType::F16).write(&file);
    let whole = std::fs::read(&file).unwrap();
    let seed: u64 = std::env::var("TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("TEST_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // the last tensor is followed by padding
    for len in (0..200).map(|_| rng.random_range(0..whole.len() - 32)).chain([0, 3, 4, 23]) {
        std::fs::write(&file, &whole[..len]).unwrap();
        let error = format!("{:#}", gguf::convert(&file, None, &out).expect_err("an error"));
        assert!(error.contains("model.gguf") && error.contains("cut off"), "{len}: {error}");
    }
    let header = whole.len() - source.names().map(|name| source.info(name).unwrap().len).sum::<usize>();
    for _ in 0..300 {
        let mut damaged = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..header);
            damaged[at] = rng.random();
        }
        std::fs::write(&file, &damaged).unwrap();
        if gguf::convert(&file, None, &out).is_ok() {
            std::fs::remove_dir_all(&out).unwrap(); // a byte of a token, say
        }
    }
}

#[test]
fn a_given_tokenizer_takes_the_place_of_one_that_cannot_be_made() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("llama")).unwrap();
    let (file, out, given) =
        (dir.path().join("a.gguf"), dir.path().join("out"), dir.path().join("tokenizer.json"));
    let mut made = made(&source, GgmlDType::F32);
    made.metadata.insert("tokenizer.ggml.pre".into(), text("unheard-of"));
    made.metadata.insert("tokenizer.chat_template".into(), text("{{ messages }}"));
    made.write(&file);
    std::fs::write(&given, "[]").unwrap();
    let error = format!("{:#}", gguf::convert(&file, Some(&given), &out).unwrap_err());
    assert!(error.contains("--tokenizer") && error.contains("\"model\""), "{error}");
    std::fs::write(&given, "{\"model\": {}}").unwrap();
    gguf::convert(&file, Some(&given), &out).unwrap();
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(read("tokenizer.json"), "{\"model\": {}}");
    assert_eq!(read("chat_template.jinja"), "{{ messages }}");
    let settings: serde_json::Value = serde_json::from_str(&read("tokenizer_config.json")).unwrap();
    assert_eq!((&settings["bos_token"], &settings["eos_token"]), (&json!("t1"), &json!("t2")));
}

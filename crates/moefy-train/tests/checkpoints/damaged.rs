//! Checkpoints that are broken or that lie.

use std::path::Path;

use dynamoe_model::checkpoint::Checkpoint;
use moefy_train::prepare::convert;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{self, HIDDEN, WIDTH};
use crate::tools::{
    EMBEDDING, NORM, assert_says, open_with_config, open_with_file, open_with_header, options, scratch,
};

#[test]
fn files_that_lie_are_refused() {
    assert!(open_with_file(|bytes| bytes).is_ok());
    assert!(open_with_header(|_| ()).is_ok());
    let says = |result, words: &[&str]| {
        assert_says(result, words);
    };
    let file = "model.safetensors";
    let claim = |len: u64| open_with_file(move |b| [&len.to_le_bytes()[..], &b[8..]].concat());
    says(claim(1 << 20), &[file, "header claims 1048576 bytes", "truncated"]);
    says(claim(u64::MAX), &[file, "header claims 18446744073709551615 bytes"]);
    says(claim(u64::MAX - 7), &[file, "header claims"]);
    says(claim(0), &[file, "header is not valid"]);
    says(open_with_file(|_| Vec::new()), &[file, "0 bytes are too few"]);
    says(open_with_file(|b| b[..b.len() - 1].to_vec()), &[file, "truncated"]);
    says(open_with_file(|b| b[..100].to_vec()), &[file, "truncated"]);
    says(open_with_file(|b| [&b[..], &[0]].concat()), &[file, "too long"]);

    let offsets = |header: &mut Value, name: &str, from: u64, to: u64| {
        header[name]["data_offsets"] = json!([from, to]);
    };
    // another tensor's place, of the right length
    says(open_with_header(|h| offsets(h, NORM, 0, 64)), &[file, "invalid offset for tensor"]);
    says(open_with_header(|h| offsets(h, NORM, 64, 0)), &[file, "invalid offset for tensor"]);
    says(open_with_header(|h| offsets(h, NORM, u64::MAX - 64, u64::MAX)), &[file, NORM, "invalid offset"]);
    says(open_with_header(|h| h[NORM]["shape"] = json!([u64::MAX, u64::MAX])), &[file, "overflow"]);
    says(open_with_header(|h| h[NORM]["shape"] = json!([HIDDEN + 1])), &[file, "invalid shape"]);
    says(open_with_header(|h| h[NORM]["dtype"] = json!("F31")), &[file, "header is not valid", "F31"]);
    says(open_with_header(|h| h[NORM] = json!(7)), &[file, "header is not valid"]);
    // eight tensors whose sizes add up to more than an offset can hold
    says(
        open_with_header(|h| {
            *h = json!({});
            let size = (1u64 << 61) - 1;
            (0..8).for_each(|i| {
                h[format!("t{i}")] =
                    json!({ "dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size] })
            });
        }),
        &[file, "18446744073709551608 bytes of data", "truncated"],
    );
}

#[test]
fn tensors_that_do_not_fit_the_config_are_refused() {
    let swap = |h: &mut Value| h[EMBEDDING]["shape"] = json!([HIDDEN, 20]);
    assert_says(open_with_header(swap), &["model.safetensors", EMBEDDING, "[20, 16]", "[16, 20]"]);
    let integers = |h: &mut Value| h[NORM]["dtype"] = json!("I32");
    assert_says(open_with_header(integers), &[NORM, "F32, F16 or BF16", "I32", "unquantized"]);
    let rename = |h: &mut Value| {
        let info = h.as_object_mut().unwrap().shift_remove(NORM).unwrap();
        h["model.norm.wait"] = info;
    };
    assert_says(open_with_header(rename), &[NORM, "missing"]);
    assert_says(
        open_with_config(|c| c["num_hidden_layers"] = json!(4)),
        &["layers.2.", "and 17 more missing"],
    );
}

#[test]
fn broken_configs_are_refused() {
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        assert_says(open_with_config(damage), words);
        assert_says(open_with_config(damage), &["config.json"]);
    };
    says(
        &|c| c["architectures"] = json!(["GPT2LMHeadModel"]),
        &[
            "GPT2LMHeadModel",
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM",
            "GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, GraniteForCausalLM, DynaMoeForCausalLM",
        ],
    );
    says(
        &|c| (c["architectures"], c["model_type"]) = (json!([]), Value::Null),
        &["architectures", "model_type"],
    );
    says(&|c| c["architectures"] = json!(["DynaMoeForCausalLM"]), &["dynamoe", "not found"]);
    says(&|c| c["hidden_act"] = json!("gelu"), &["hidden_act", "silu", "gelu_pytorch_tanh", "\"gelu\""]);
    says(&|c| c["mlp_bias"] = json!(true), &["gate_proj.bias", "missing"]);
    says(&|c| c["quantization_config"] = json!({ "quant_method": "gptq" }), &["gptq", "unquantized"]);
    says(&|c| c["rope_scaling"] = json!({ "rope_type": "longrope", "factor": 4 }), &["longrope", "llama3"]);
    says(&|c| c["rope_scaling"] = json!({ "type": "linear" }), &["rope_scaling", "factor", "missing"]);
    says(&|c| c["hidden_size"] = json!("16"), &["hidden_size", "\"16\""]);
    says(&|c| c["hidden_size"] = json!(0), &["hidden_size", "found 0"]);
    says(&|c| c["vocab_size"] = json!(u64::MAX), &["vocab_size"]);
    says(&|c| c["num_hidden_layers"] = json!(1 << 27), &["num_hidden_layers", "10000"]);
    says(&|c| c["num_key_value_heads"] = json!(3), &["num_key_value_heads", "multiple"]);
    says(&|c| c["eos_token_id"] = json!("end"), &["eos_token_id"]);
    says(&|c| c["tie_word_embeddings"] = json!(1), &["tie_word_embeddings", "true or false"]);
    assert_says(Checkpoint::open(Path::new("/nowhere/at/all")), &["/nowhere/at/all", "not a folder"]);
    let dir = TempDir::new().unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json", "JSON"]);
    std::fs::write(dir.path().join("config.json"), support::config("LlamaForCausalLM").to_string()).unwrap();
    assert_says(Checkpoint::open(dir.path()), &["model.safetensors.index.json", "safetensors weights"]);
}

#[test]
fn broken_sections_are_refused() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let out = dir.path().join("out");
    convert(&source, None, &options(), &out).unwrap();
    let good: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        let mut config = good.clone();
        damage(&mut config["dynamoe"]);
        std::fs::write(out.join("config.json"), config.to_string()).unwrap();
        assert_says(Checkpoint::open(&out), words);
    };
    says(&|d| d["colour"] = json!("red"), &["unknown field", "colour"]);
    says(&|d| d["router"]["colour"] = json!("red"), &["unknown field", "colour"]);
    says(&|d| d["version"] = json!(4), &["version 4", "update"]);
    says(&|d| d["own_shells"] = json!(1), &["own_shells", "version 2", "version 1"]);
    says(&|d| d["version"] = json!(0), &["version"]);
    says(&|d| d["expert_widths"] = json!([12, 8, WIDTH]), &["expert_widths", "strictly increasing"]);
    says(&|d| d["expert_widths"] = json!([8, 12, 25]), &["expert_widths", "width 24"]);
    says(&|d| d["expert_widths"] = json!([8, WIDTH]), &["router.fc2.weight", "[1, 5]", "[2, 5]"]);
    says(&|d| d["sensitivity"] = json!(1.5), &["sensitivity", "1.5"]);
    says(&|d| d["base_architecture"] = json!("T5"), &["T5", "supported"]);
    says(&|d| d["router"]["hidden_size"] = json!(6), &["router.fc1.weight", "[6, 16]", "[5, 16]"]);
}

#[test]
fn an_index_stays_in_its_folder() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 3);
    let index = source.dir().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    std::fs::copy(source.dir().join("model-00001-of-00003.safetensors"), dir.path().join("a.safetensors"))
        .unwrap();
    let absolute = dir.path().join("a.safetensors");
    for file in [
        "../a.safetensors",
        absolute.to_str().unwrap(),
        "..",
        "x/a.safetensors",
        "./a.safetensors",
        "",
        "..\\a",
    ] {
        let mut bad = good.clone();
        bad["weight_map"][EMBEDDING] = json!(file);
        std::fs::write(&index, bad.to_string()).unwrap();
        assert_says(Checkpoint::open(source.dir()), &["index.json", EMBEDDING, "in the same folder"]);
    }
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        let mut bad = good.clone();
        damage(&mut bad);
        std::fs::write(&index, bad.to_string()).unwrap();
        assert_says(Checkpoint::open(source.dir()), words);
    };
    says(&|i| i["weight_map"][NORM] = json!("model-9.safetensors"), &["model-9.safetensors", "missing"]);
    says(&|i| i["weight_map"][NORM] = json!(3), &[NORM]);
    says(&|i| i["weight_map"] = json!({}), &["weight_map"]);
    says(&|i| *i = json!([]), &["weight_map"]);
    std::fs::write(&index, "{").unwrap();
    assert_says(Checkpoint::open(source.dir()), &["index.json", "JSON"]);
    std::fs::write(&index, good.to_string()).unwrap();
    assert!(Checkpoint::open(source.dir()).is_ok());
}

#[test]
fn random_damage_never_panics() {
    let dir = TempDir::new().unwrap();
    support::write(dir.path(), &support::config("LlamaForCausalLM"), Dtype::F32, 1);
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut refused = 0;
    for _ in 0..2000 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let place = rng.random_range(0..header);
            bad[place] = if rng.random() { rng.random_range(b'0'..=b'9') } else { rng.random() };
        }
        if rng.random_bool(0.1) {
            bad.truncate(rng.random_range(0..bad.len()));
        }
        std::fs::write(&path, bad).unwrap();
        refused += usize::from(Checkpoint::open(dir.path()).is_err());
    }
    assert!(refused > 1500, "{refused}");
}

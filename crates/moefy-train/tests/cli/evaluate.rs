//! `evaluate`, `export` and `inspect`.

use std::fs;

use moefy_train::data::corpus::BOUNDARY;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::lab::{Lab, run_args};
use crate::support;

/// A lab with a trained model in `out`.
fn trained() -> Lab {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--baselines", "none"]));
    lab
}

#[test]
fn evaluation_measures_points_of_the_dial() {
    let lab = trained();
    let found = lab.evaluate("out", &["--sensitivity", "0.5,1"]);
    let points = found["results"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    for (point, sensitivity) in points.iter().zip([0.5, 1.0]) {
        assert_eq!(point["sensitivity"], sensitivity);
        assert!(point["budget"].is_null());
        let number = |key: &str| point[key].as_f64().unwrap_or_else(|| panic!("{key} in {point}"));
        assert!((number("perplexity") / number("loss").exp() - 1.0).abs() < 1e-9);
        assert!(number("stderr") > 0.0 && number("tokens") > 100.0);
        let layers: Vec<f64> = serde_json::from_value(point["width_per_layer"].clone()).unwrap();
        assert_eq!(layers.len(), support::LAYERS);
        assert!((layers.iter().sum::<f64>() / layers.len() as f64 - number("mean_width")).abs() < 1e-9);
        assert!((0.25..=1.0).contains(&number("mean_width")));
    }
    assert_eq!(points[1]["mean_width"], 1.0);
    let shuffled = lab.evaluate("out", &["--sensitivity", "0.5,1", "--shuffled"])["results"].clone();
    assert_eq!(shuffled[0]["tokens"], points[0]["tokens"]);
    assert_eq!(shuffled[1]["loss"], points[1]["loss"]);
    let found = lab.evaluate("out", &["--budget", "0.5,0.75"]);
    assert_eq!(found["results"][0]["budget"], 0.5);
    assert_eq!(found["results"][1]["budget"], 0.75);
    let table = lab.ok(&["evaluate", "--model", "out", "--data", "valid.txt", "--sequence-length", "32"]);
    assert_eq!(table.lines().filter(|line| line.contains("width per layer")).count(), 11, "{table}");
}

#[test]
fn a_trained_model_is_exported_and_inspected() {
    let lab = trained();
    lab.ok(&["export", "--model", "out", "--dense", "--out", "exported"]);
    assert_eq!(lab.json("exported/config.json")["architectures"], json!(["LlamaForCausalLM"]));
    assert!((lab.loss("exported") - lab.loss("out")).abs() < 1e-6);
    assert_eq!(lab.evaluate("exported", &[])["results"].as_array().unwrap().len(), 1);
    assert!(lab.ok(&["inspect", "out"]).contains("active parameters"));
    let inspected: Value = serde_json::from_str(&lab.ok(&["inspect", "out", "--json"])).unwrap();
    let experts = inspected["dynamoe"]["experts"].as_array().unwrap();
    let widths: Vec<_> = experts.iter().map(|expert| expert["width"].clone()).collect();
    assert_eq!(widths, [8, 16, 24, 32]);
    assert_eq!(inspected["dynamoe"]["own_shells"], 2);
}

#[test]
fn conversion_keeps_the_loss_for_every_architecture() {
    for architecture in support::ARCHITECTURES {
        let lab = Lab::with(architecture, Dtype::F32);
        lab.convert();
        let (dense, converted) = (lab.loss("dense"), lab.loss("converted"));
        assert!((dense - converted).abs() < 1e-5, "{architecture}: {dense} {converted}");
    }
}

#[test]
fn missing_budgets_are_solved_and_kept() {
    let lab = Lab::new();
    lab.convert();
    let found = lab.evaluate("converted", &["--budget", "0.5"]);
    assert_eq!(found["results"][0]["budget"], 0.5);
    let rows = lab.json("converted/config.json")["dynamoe"]["budgets"].clone();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(lab.evaluate("converted", &["--budget", "0.5"]), found);
    assert_eq!(lab.json("converted/config.json")["dynamoe"]["budgets"], rows);
}

#[test]
fn the_ends_of_texts_may_be_named_by_the_tokenizer() {
    let lab = Lab::new();
    let expected = lab.loss("dense");
    let mut config = lab.json("dense/config.json");
    (config["bos_token_id"], config["eos_token_id"]) = (json!(-1), Value::Null);
    fs::write(lab.path("dense/config.json"), config.to_string()).unwrap();
    let evaluate = ["evaluate", "--model", "dense", "--data", "valid.txt"];
    lab.fails(&evaluate, &["neither bos_token_id nor eos_token_id", "tokenizer_config.json"]);
    let named = json!({ "bos_token": { "content": BOUNDARY } });
    fs::write(lab.path("dense/tokenizer_config.json"), named.to_string()).unwrap();
    assert_eq!(lab.loss("dense"), expected);
}

#[test]
fn a_token_beyond_the_embedding_is_refused_only_where_text_uses_it() {
    let lab = Lab::new();
    let mut tokenizer = lab.json("dense/tokenizer.json");
    let id = lab.json("dense/config.json")["vocab_size"].as_u64().unwrap();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": id, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    }));
    fs::write(lab.path("dense/tokenizer.json"), tokenizer.to_string()).unwrap();
    assert!(lab.loss("dense").is_finite());
    fs::write(lab.path("valid.txt"), "a<pad>b").unwrap();
    let words = ["valid.txt", "\"<pad>\"", &id.to_string()];
    lab.fails(&["evaluate", "--model", "dense", "--data", "valid.txt", "--documents"], &words);
}

#[test]
fn a_reader_that_leaves_is_no_crash() {
    let lab = Lab::new();
    for args in [
        &["inspect", "dense", "--json"][..],
        &["evaluate", "--model", "dense", "--data", "valid.txt", "--sequence-length", "32"],
    ] {
        let mut child = lab.command(args).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}\n{stderr}", output.status);
        assert!(!stderr.contains("error"), "{args:?}: {stderr}");
    }
}

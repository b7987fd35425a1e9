//! `evaluate --activation-sparsity`: the baseline that needs no training.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::lab::{Lab, run_args};
use crate::support::{ARCHITECTURES, LAYERS};

/// Asks for these sparsities, with thresholds of valid.txt.
fn sparse<'a>(sparsities: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let text = ["--calibration-data", "valid.txt", "--sequence-length", "32"];
    [&["--activation-sparsity", sparsities], &text[..], more].concat()
}

fn number(point: &Value, key: &str) -> f64 {
    point[key].as_f64().unwrap_or_else(|| panic!("{key} in {point}"))
}

#[test]
fn at_sparsity_0_it_is_the_dense_model() {
    for architecture in ARCHITECTURES {
        let lab = Lab::with(architecture, Dtype::F32);
        let dense = lab.evaluate("dense", &["--sensitivity", "1"])["results"][0].clone();
        let mut found = lab.evaluate("dense", &sparse("0", &[]))["results"][0].clone();
        assert_eq!(found.as_object_mut().unwrap().remove("activation_sparsity"), Some(json!(0.0)));
        assert_eq!(found, dense, "{architecture}");
    }
    // and with a bias
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--baselines", "none"]));
    lab.ok(&["export", "--model", "out", "--dense", "--width", "0.25", "--out", "quarter"]);
    assert_eq!(lab.json("quarter/config.json")["mlp_bias"], true);
    let found = lab.evaluate("quarter", &sparse("0", &[]));
    assert_eq!(number(&found["results"][0], "loss"), lab.loss("quarter"));
}

#[test]
fn each_sparsity_is_measured_as_it_turned_out() {
    let lab = Lab::new();
    let found = lab.evaluate("dense", &sparse("0,0.25,0.4,0.5", &[]));
    let points = found["results"].as_array().unwrap();
    assert_eq!(points.len(), 4);
    for (point, sparsity) in points.iter().zip([0.0, 0.25, 0.4, 0.5]) {
        assert_eq!(number(point, "activation_sparsity"), sparsity);
        assert_eq!(number(point, "sensitivity"), 1.0);
        let layers: Vec<f64> = serde_json::from_value(point["width_per_layer"].clone()).unwrap();
        let kept = number(point, "mean_width");
        assert!((layers.iter().sum::<f64>() / LAYERS as f64 - kept).abs() < 1e-9);
        // not quite what was asked for: thresholds are of the dense model's activations
        assert!(layers.iter().all(|kept| (kept - (1.0 - sparsity)).abs() < 0.06), "{layers:?}");
        let cheaper = |key: &str| (number(point, key) < 1.0) == (sparsity > 0.0);
        assert!(cheaper("active_parameters") && cheaper("flops"), "{point}");
        assert_eq!(point["loss"] == points[0]["loss"], sparsity == 0.0);
    }
    assert_eq!(lab.evaluate("dense", &sparse("0.4", &[]))["results"][0], points[2]);
}

#[test]
fn tasks_are_scored_and_named_too() {
    let lab = Lab::new();
    let lines = |name: &str, line: &dyn Fn(usize) -> Value| {
        let lines: Vec<String> = (0..8).map(|n| line(n).to_string()).collect();
        fs::write(lab.path(name), lines.join("\n")).unwrap();
    };
    lines("pairs.jsonl", &|n| json!({ "good": format!("Tom bought {n} plums."), "bad": "plums bought" }));
    lines(
        "fruit.jsonl",
        &|n| json!({ "context": format!("Day {n} at the"), "choices": [" fruit stall", " of"], "answer": 0 }),
    );
    let tasks = ["--pairs", "pairs.jsonl", "--choices", "fruit.jsonl"];
    let found = lab.evaluate("dense", &sparse("0,0.5", &tasks));
    let dense = lab.evaluate("dense", &tasks);
    for task in ["pairs", "choices"] {
        for (at, sparsity) in [0.0, 0.5].into_iter().enumerate() {
            assert_eq!(number(&found[task][at], "activation_sparsity"), sparsity);
            let kept = number(&found[task][at], "mean_width");
            assert!((kept - (1.0 - sparsity)).abs() < 0.1, "{kept}");
        }
        assert!(dense[task][0].get("activation_sparsity").is_none());
    }
    let log_likelihoods = |of: &Value, at: usize| of["choices"][at]["log_likelihoods"].clone();
    assert_eq!(log_likelihoods(&found, 0), log_likelihoods(&dense, 0));
    assert_ne!(log_likelihoods(&found, 1), log_likelihoods(&dense, 0));

    let evaluate = ["evaluate", "--model", "dense", "--data", "valid.txt"];
    let table = lab.ok(&[&evaluate[..], &sparse("0.25,0.5", &tasks)].concat());
    let words = [
        "activation sparsity    loss",
        "\n             0.2500  ",
        "\n             0.5000  ",
        "minimal pairs at activation sparsity 0.2500: ",
        "fruit at activation sparsity 0.5000: ",
    ];
    words.iter().for_each(|word| assert!(table.contains(word), "{word:?} in {table}"));
    assert!(!table.contains("sensitivity"), "{table}");
}

#[test]
fn what_has_no_such_baseline_is_refused() {
    let lab = Lab::new();
    lab.convert();
    let fails = |model: &str, args: &[&str], words: &[&str]| {
        let evaluate = ["evaluate", "--model", model, "--data", "valid.txt", "--documents"];
        lab.fails(&[&evaluate[..], args].concat(), words);
    };
    fails("converted", &sparse("0.5", &[]), &["converted: a DynaMoE checkpoint", "dense model"]);
    for (wrong, words) in [
        ("--activation-sparsity=1", &["0 or more and below 1", "found 1"][..]),
        ("--activation-sparsity=-0.1", &["0 or more and below 1", "found -0.1"]),
        ("--activation-sparsity=0.5,NaN", &["below 1", "found NaN"]),
        ("--activation-sparsity=half", &["half"]),
    ] {
        fails("dense", &[wrong, "--calibration-data", "valid.txt"], words);
    }
    fails("dense", &["--activation-sparsity", "0.5"], &["--calibration-data"]);
    for other in [&["--sensitivity", "1"][..], &["--budget", "1"], &["--shuffled"]] {
        fails("dense", &sparse("0.5", other), &["--activation-sparsity", "cannot be used with", other[0]]);
    }
    fs::write(lab.path("blank.txt"), " \n").unwrap();
    let blank = ["--activation-sparsity", "0.5", "--calibration-data", "blank.txt"];
    fails("dense", &blank, &["--sequence-length", "64 positions"]); // 256 by default
    fails("dense", &[&blank[..], &["--sequence-length", "32"]].concat(), &["blank.txt"]);
}

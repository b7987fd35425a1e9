//! What a training says of the memory that it needs.

use std::fs;

use moefy_train::data::corpus::{BOUNDARY, documents};
use safetensors::Dtype;
use serde_json::json;

use crate::lab::{Lab, SHAPE, compare_args, finished, run_args};
use crate::support;

/// The number of bytes that a text such as "1.5 GB to train" begins with.
fn bytes(text: &str) -> f64 {
    let mut words = text.split(' ');
    let number: f64 = words.next().unwrap().parse().unwrap();
    number * if words.next().unwrap().starts_with("GB") { 1e9 } else { 1e6 }
}

#[test]
fn memory_is_what_was_said_before() {
    let lab = Lab::with("LlamaForCausalLM", Dtype::BF16);
    let mut config = support::config("LlamaForCausalLM");
    for (key, size) in [
        ("hidden_size", 128),
        ("intermediate_size", 512),
        ("num_hidden_layers", 4),
        ("vocab_size", 8000),
        ("max_position_embeddings", 256),
    ] {
        config[key] = json!(size);
    }
    let tokenizer = fs::read(lab.path("dense/tokenizer.json")).unwrap();
    support::write(&lab.path("large"), &config, Dtype::BF16, 1);
    fs::write(lab.path("large/tokenizer.json"), tokenizer).unwrap();
    fs::write(lab.path("long.txt"), documents(3, 80).join(&format!("\n{BOUNDARY}\n"))).unwrap();
    let args =
        ["run", "--model", "large", "--data", "long.txt", "--valid", "long.txt", "--baselines", "none"];
    let size =
        ["--tokens", "8192", "--batch-size", "16", "--sequence-length", "256", "--eval-tokens", "1000"];
    for (out, options) in [
        ("all", &[][..]),
        ("added", &["--train", "added"]),
        ("small", &["--train", "added", "--recompute", "--micro-batch", "4"]),
        ("bytes", &["--moment-bits", "8"]),
    ] {
        let args = [&args[..], &size, &["--out", out], options].concat();
        let output = lab.output(&args);
        let lines = String::from_utf8(output.stderr.clone()).unwrap();
        finished(output, &args);
        let told: Vec<&str> =
            lines.lines().filter_map(|line| line.split_once("memory: ")).map(|(_, told)| told).collect();
        let [estimate, peak] = told[..] else { panic!("{lines}") };
        let phases = estimate.strip_prefix("about ").unwrap().split(&[';', '('][..]).next().into_iter();
        let rest = estimate.split_once("), ").unwrap().1.split("; ").next().unwrap().split(", ");
        let estimate = phases.chain(rest).map(bytes).fold(0.0, f64::max);
        let share = bytes(peak) / estimate;
        println!("{out}: {estimate:.3e}, {peak}: {share:.2}");
        assert!((0.85..=1.15).contains(&share), "{out}: {share} of what was said: {told:?}");
    }
}

#[test]
fn a_training_that_does_not_fit_does_not_start() {
    let lab = Lab::new();
    let huge = ["--batch-size", "8000000"];
    let args = run_args("out", "1", &[]);
    let args: Vec<&str> = args.into_iter().filter(|arg| !SHAPE.contains(arg)).collect();
    let words = ["of memory are needed", "available", "--recompute --train added --micro-batch", "needs"];
    lab.fails(&[&args[..], &huge, &["--sequence-length", "32"]].concat(), &words);
    assert!(!lab.path("out").exists() && !lab.path("cache").exists(), "nothing is done before");
    let compare = compare_args("out", &[]);
    let compare: Vec<&str> = compare.into_iter().filter(|arg| !SHAPE.contains(arg)).collect();
    let words = ["variant \"", "of memory are needed", "--recompute"];
    lab.fails(&[&compare[..], &huge, &["--sequence-length", "32"]].concat(), &words);
    let pretrain = ["pretrain", "--out", "out", "--data", "train.txt", "--sequence-length", "32"];
    lab.fails(&[&pretrain[..], &huge].concat(), &["of memory are needed", "--recompute --micro-batch"]);
    assert!(!lab.path("out").exists() && !lab.path("cache").exists(), "nothing is done before");
    lab.convert();
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", "out", "--tokens", "1"];
    lab.fails(
        &[&args[..], &huge, &["--sequence-length", "32", "--train", "added"]].concat(),
        &["--recompute"],
    );
}

//! `--precision`.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::lab::{Lab, run_args};
use crate::support;

#[test]
fn bf16_rounds_and_changes_little() {
    let mut config = support::config("LlamaForCausalLM");
    config["hidden_size"] = json!(64); // smaller products stay f32
    let lab = Lab::of(config, Dtype::F32);
    let args = |out, precision| run_args(out, "1280", &["--baselines", "none", "--precision", precision]);
    lab.ok(&args("f32", "f32"));
    if !lab.output(&args("bf16", "bf16")).status.success() {
        let words = ["--precision", "avx512_bf16", "use f32"];
        lab.fails(&args("bf16", "bf16"), &words);
        return println!("not compared: this processor has no bf16 dot products");
    }
    let losses = |out: &str| -> Vec<f64> {
        let log = fs::read_to_string(lab.path(out).join("training/state/metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap();
        log.lines().map(loss).collect()
    };
    let of_dense =
        |precision| lab.evaluate("dense", &["--precision", precision])["results"][0]["loss"].clone();
    let evaluated = |precision| vec![of_dense(precision).as_f64().unwrap()];
    for (exact, rounded) in [(losses("f32"), losses("bf16")), (evaluated("f32"), evaluated("bf16"))] {
        assert_eq!(exact.len(), rounded.len());
        for (exact, rounded) in exact.iter().zip(&rounded) {
            let difference = (exact - rounded).abs() / exact;
            assert!(difference > 0.0 && difference < 5e-2, "{exact} {rounded}");
        }
    }
    // a training goes on with the precision that it began with
    let words = ["precision", "bf16", "f32"];
    lab.fails(&[&args("bf16", "f32")[..], &["--resume"]].concat(), &words);
}

//! `export --dense --width`: an ordinary model of less width.

use safetensors::Dtype;

use crate::lab::{Lab, SHAPE, run_args};

#[test]
fn a_slice_is_measured_like_any_dense_model() {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--baselines", "none"]));
    let width = ["export", "--model", "out", "--dense", "--width"];
    let told = lab.ok(&[&width[..], &["0.25", "--out", "quarter"]].concat());
    assert!(
        told.contains("8 of 32 neurons") && told.contains("compensation as a bias of down_proj"),
        "{told}"
    );
    assert!(told.contains("the first 8 with the smaller experts' separate weights"), "{told}");
    // at sensitivity 0 every token takes the smallest expert
    let loss = |model: &str, dial: &str| {
        lab.evaluate(model, &["--sensitivity", dial])["results"][0]["loss"].as_f64().unwrap()
    };
    let (slice, model) = (loss("quarter", "1"), loss("out", "0"));
    assert!((slice - model).abs() < 1e-5, "{slice} {model}");
    assert!((loss("out", "1") - model).abs() > 1e-3, "the widths differ");
    lab.ok(&[&width[..], &["1", "--out", "whole"]].concat());
    lab.ok(&["export", "--model", "out", "--dense", "--out", "dense2"]);
    assert_eq!(lab.tensors("whole"), lab.tensors("dense2"));

    let fails = |args: &[&str], words: &[&str]| lab.fails(&[args, &["--out", "no"]].concat(), words);
    fails(&["export", "--model", "out", "--width", "0.5"], &["--dense"]);
    fails(&["export", "--model", "dense", "--dense", "--width", "0.5"], &["a dense model", "--width"]);
    fails(&[&width[..], &["12"]].concat(), &["--width", "found 12"]);
    let data = ["--data", "train.txt"];
    let calibrate = ["calibrate", "--model", "quarter", "--sequence-length", "32"];
    fails(&[&calibrate, &data[..]].concat(), &["mlp_bias", "calibration"]);
    let finetune = ["finetune", "--model", "quarter", "--method", "dense", "--tokens", "128"];
    fails(&[&finetune[..], &data, &SHAPE].concat(), &["mlp_bias", "training"]);
    assert!(!lab.path("no").exists());
}

#[test]
fn a_slice_without_compensation_says_so() {
    let lab = Lab::with("Qwen3ForCausalLM", Dtype::BF16);
    lab.convert();
    let args = ["export", "--model", "converted", "--dense", "--width", "0.5", "--out", "half"];
    let output = lab.output(&args);
    assert!(output.status.success());
    let warned = String::from_utf8(output.stderr).unwrap();
    assert!(warned.contains("Qwen3ForCausalLM") && warned.contains("without compensation"), "{warned}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("no compensation"));
    assert!(lab.loss("half") > 0.0);
}

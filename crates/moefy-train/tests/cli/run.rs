//! `run`: one command from a dense model to a report.

use std::fs;

use dynamoe_model::checkpoint::Checkpoint;
use safetensors::Dtype;
use serde_json::json;

use crate::lab::{Lab, SHAPE, compare_args, finetune_args, finished, run_args};
use crate::support::{self, contents};

#[test]
fn a_run_leaves_a_checkpoint_and_a_report() {
    let lab = Lab::new();
    let dense = contents(&lab.path("dense"));
    let stdout = lab.ok(&run_args("out", "2560", &["--baselines", "static", "--oracle"]));
    assert!(stdout.contains("out/report.html") && stdout.contains("dynamoe-serve --model out"), "{stdout}");
    assert_eq!(contents(&lab.path("dense")), dense);

    let config = lab.json("out/config.json");
    assert_eq!(config["architectures"], json!(["DynaMoeForCausalLM"]));
    assert!(!config["dynamoe"]["budgets"].as_array().unwrap().is_empty());
    Checkpoint::open(&lab.path("out")).unwrap();
    let page = fs::read(lab.path("out/report.html")).unwrap();
    assert!(String::from_utf8_lossy(&page).contains("static nested"));
    let curves = lab.json("out/report.json")["curves"].clone();
    let names: Vec<&str> = curves.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["DynaMoE", "oracle routing", "static nested"]);
    fs::remove_file(lab.path("out/report.html")).unwrap();
    lab.ok(&["report", "--run", "out"]);
    assert!(fs::read(lab.path("out/report.html")).unwrap() == page);
}

/// Every phase says how far it is, how fast, and how long it took.
#[test]
fn every_phase_shows_its_progress() {
    let lab = Lab::new();
    let args = run_args("out", "1280", &["--baselines", "static"]);
    let output = lab.output(&args);
    let lines = String::from_utf8(output.stderr.clone()).unwrap();
    finished(output, &args);
    for (phase, unit) in [
        ("reading activations", "tokens"),
        ("ordering neurons", "layers"),
        ("converting", "layers"),
        ("measuring the dense model", "tokens"),
        ("DynaMoE", "tokens"),
        ("solving the dial", "budgets"),
        ("writing the checkpoint", "bytes"),
        ("measuring the curve", "tokens"),
        ("static nested", "tokens"),
    ] {
        let found = lines.lines().filter_map(|line| line.strip_prefix(phase)).next_back();
        let found = found.unwrap_or_else(|| panic!("{phase} is silent: {lines}"));
        let (done, rest) = found.trim().split_once('/').unwrap();
        let (total, rest) = rest.split_once(' ').unwrap();
        assert_eq!(done, total, "{phase}: {found}");
        assert!(rest.starts_with(unit) && rest.contains(&format!(" {unit}/s, in ")), "{phase}: {found}");
    }
    let evaluate = ["evaluate", "--model", "out", "--data", "valid.txt", "--documents", "--budget", "0.5"];
    let output = lab.output(&evaluate);
    assert!(String::from_utf8_lossy(&output.stderr).contains("evaluating "));
}

#[test]
fn what_could_not_be_served_is_said_before_training() {
    let mut config = support::config("Qwen2ForCausalLM");
    config["head_dim"] = json!(8);
    let lab = Lab::of(config, Dtype::F32);
    lab.convert();
    let short = ["--baselines", "none", "--eval-tokens", "100"];
    for args in [
        vec!["convert", "--model", "dense", "--out", "again"],
        run_args("run", "256", &short),
        finetune_args("tuned", &[]),
        compare_args("compared", &["--seeds", "1", "--baselines", "none"]),
    ] {
        let output = lab.output(&args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        finished(output, &args);
        let said = stderr.find("dynamoe-serve will refuse the result: config.json: \"head_dim\" 8");
        let trained = stderr.find("loss").unwrap_or(stderr.len());
        assert!(said.is_some_and(|said| said < trained), "{args:?}: {stderr}");
    }
}

#[test]
fn a_seed_decides_every_bit() {
    let lab = Lab::new();
    for (out, seed, threads) in [("a", "5", "1"), ("b", "5", "3"), ("c", "6", "3")] {
        let args = run_args(out, "640", &["--baselines", "none", "--seed", seed]);
        finished(lab.command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap(), &args);
    }
    let model = |out: &str| fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(model("a") == model("b"));
    assert!(model("a") != model("c"));
    assert_eq!(lab.json("a/report.json")["curves"], lab.json("b/report.json")["curves"]);
}

#[test]
fn a_config_file_stands_for_flags() {
    let lab = Lab::new();
    let text = "model = 'dense'\ndata = ['train.txt']\nvalid = 'valid.txt'\ntokens = 640\nbatch_size = 4\n\
                sequence-length = 32\nbaselines = 'static,dense'\nlr = 2e-3\nset = ['clip=0.5']\noracle = true\n";
    fs::write(lab.path("run.toml"), text).unwrap();
    lab.ok(&["run", "--config", "run.toml", "--out", "out", "--lr", "0.004"]);
    let settings = lab.json("out/training/job.json")["recipe"]["train"].clone();
    let found = ["lr", "tokens", "batch-size"].map(|key| settings[key].clone());
    assert_eq!(found, [json!(0.004), json!(640), json!(4)]);
    assert_eq!(settings["tuning"]["clip"], 0.5);
    assert_eq!(lab.json("out/report.json")["curves"].as_array().unwrap().len(), 4);

    fs::write(lab.path("run.toml"), format!("{text}lerning-rate = 1\n")).unwrap();
    for config in [&["--config", "run.toml"][..], &["--config=run.toml"]] {
        let words = ["run.toml: unknown key \"lerning-rate\"", "run --help"];
        lab.fails(&[&["run"][..], config, &["--out", "other"]].concat(), &words);
    }
    fs::write(lab.path("run.toml"), "lr = 1\ntokens = \n").unwrap();
    lab.fails(&["run", "--config", "run.toml"], &["run.toml: line 2: "]);
    lab.fails(&["run", "--config", "no.toml"], &["no.toml", "No such file"]);
}

#[test]
fn a_run_that_only_adds_is_the_dense_model_at_full_width() {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--train", "added"]));
    let report = lab.json("out/report.json");
    let full = report["curves"][0]["points"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(full["mean_width"], 1.0);
    // neurons stand in another order, so sums are rounded otherwise
    let difference = full["loss"].as_f64().unwrap() - report["dense_loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-5, "{difference}");
    let names: Vec<_> = report["curves"].as_array().unwrap().iter().map(|c| c["name"].clone()).collect();
    assert_eq!(names, ["DynaMoE", "dense fine-tuned", "static nested", "random routing"]);
    lab.ok(&["export", "--model", "out", "--dense", "--out", "back"]);
    assert_eq!(lab.tensors("back"), lab.tensors("dense"), "the original tensors, in their order");
}

#[test]
fn standard_error_may_be_closed() {
    let lab = Lab::new();
    let args = run_args("out", "640", &["--baselines", "none"]);
    let mut child = lab.command(&args).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    assert!(lab.path("out/report.html").is_file());
}

#[test]
fn a_training_that_goes_wrong_is_told() {
    let lab = Lab::new();
    let lines = |args: &[&str]| {
        let args = [args, &["--save-every", "50"]].concat();
        let output = lab.output(&args);
        let lines = String::from_utf8(output.stderr.clone()).unwrap();
        finished(output, &args);
        lines
    };
    let good = lines(&run_args("good", "25600", &["--baselines", "none", "--lr", "5e-3"]));
    let told = ["step 50: loss at full width", "of the narrowest expert", "step 200: "];
    assert!(told.iter().all(|words| good.contains(words)) && !good.contains("has risen"), "{good}");
    let bad = ["finetune", "--model", "good", "--data", "train.txt", "--out", "bad", "--tokens", "1280"];
    let bad = lines(&[&bad[..], &SHAPE, &["--lr", "10"]].concat());
    assert!(bad.contains("the loss at full width has risen: a smaller --lr, or --train added"), "{bad}");
}

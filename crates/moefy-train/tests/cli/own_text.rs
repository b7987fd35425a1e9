//! `--data self`: text that the model writes itself.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::lab::{Lab, SHAPE, compare_args, finetune_args, run_args};
use crate::support;

/// These arguments with `self` text in the place of train.txt.
fn own<'a>(args: Vec<&'a str>, data: &'a str) -> Vec<&'a str> {
    args.into_iter().map(|arg| if arg == "train.txt" { data } else { arg }).collect()
}

fn lines(lab: &Lab, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(lab.path(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_trains_on_what_the_model_writes() {
    let lab = Lab::new();
    let args = own(run_args("out", "1280", &["--baselines", "none"]), "self:900");
    let output = lab.output(&args);
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    crate::lab::finished(output, &args);
    let said = stderr.lines().rfind(|line| line.starts_with("writing text")).unwrap_or_default();
    assert!(said.contains(" 900/900 tokens, ") && said.contains(" tokens/s, in "), "{stderr}");
    assert!(!stderr.contains("without --valid"));
    assert!(lines(&lab, "out/training/self.jsonl").len() > 5);
    assert_eq!(lab.json("out/training/job.json")["self"]["tokens"], 900);
    let report = fs::read_to_string(lab.path("out/report.html")).unwrap();
    assert!(report.contains("self.jsonl (written by the model itself)"));
    assert!(lab.json("out/config.json")["dynamoe"].is_object());

    // the text is one like any other, and is not written again
    lab.ok(&own(run_args("again", "640", &["--baselines", "none"]), "out/training/self.jsonl"));
    lab.fails(&args, &["not empty", "--resume"]);
    let other = own(run_args("out", "1280", &["--baselines", "none", "--resume"]), "self:901");
    lab.fails(&other, &["self.tokens: was 900, now 901"]);
    // a file of that name is reached by a path
    fs::copy(lab.path("train.txt"), lab.path("self.txt")).unwrap();
    lab.ok(&own(run_args("file", "640", &["--baselines", "none"]), "./self.txt"));
    // without a number, a quarter of what is trained on; without --valid, its end is measured on
    let base = ["run", "--model", "dense", "--data", "self", "--data", "train.txt:0.5", "--out", "quarter"];
    let args = [&base[..], &["--tokens", "2560", "--baselines", "none"], &SHAPE].concat();
    let output = lab.output(&args);
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    crate::lab::finished(output, &args);
    assert!(stderr.contains("measured on the model's own text"), "{stderr}");
    assert_eq!(lab.json("quarter/training/job.json")["self"]["tokens"], 640);
}

#[test]
fn a_run_that_was_cut_while_it_wrote_ends_with_the_same_bits() {
    let lab = Lab::new();
    let args = |out| own(run_args(out, "640", &["--baselines", "none", "--resume"]), "self:2000");
    lab.ok(&args("whole"));
    let text = fs::read(lab.path("whole/training/self.jsonl")).unwrap();
    for (name, kept) in [("early", 10), ("late", text.len() - 10)] {
        fs::create_dir_all(lab.path(name).join("training")).unwrap();
        fs::copy(lab.path("whole/training/job.json"), lab.path(name).join("training/job.json")).unwrap();
        fs::write(lab.path(name).join("training/self.jsonl.partial"), &text[..kept]).unwrap();
        lab.ok(&args(name));
        assert!(fs::read(lab.path(name).join("training/self.jsonl")).unwrap() == text, "{name}");
        assert!(lab.tensors(name) == lab.tensors("whole"), "{name}");
    }
}

#[test]
fn threads_change_no_bit() {
    let lab = Lab::new();
    for (out, threads) in [("a", "1"), ("b", "3")] {
        let args = own(run_args(out, "640", &["--baselines", "none"]), "self:4000");
        crate::lab::finished(lab.command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap(), &args);
    }
    let text = |out: &str| fs::read(lab.path(out).join("training/self.jsonl")).unwrap();
    assert!(text("a") == text("b"));
}

#[test]
fn all_architectures_write() {
    for architecture in support::ARCHITECTURES {
        let lab = Lab::with(architecture, Dtype::BF16);
        lab.ok(&own(run_args("out", "128", &["--baselines", "none", "--eval-tokens", "100"]), "self:200"));
        assert!(!lines(&lab, "out/training/self.jsonl").is_empty(), "{architecture}");
    }
}

#[test]
fn finetune_lets_the_dense_model_write() {
    let lab = Lab::new();
    lab.convert();
    let text = |out: &str| fs::read(lab.path(out).join("training/self.jsonl")).unwrap();
    lab.ok(&own(finetune_args("itself", &[]), "self"));
    assert_eq!(lab.json("itself/training/job.json")["self"]["tokens"], 160);
    lab.ok(&own(finetune_args("taught", &["--teacher", "dense"]), "self"));
    // sums of reordered neurons may tip a draw, so only the beginning is compared
    assert_eq!(text("itself")[..40], text("taught")[..40]);
    let dense = ["finetune", "--model", "dense", "--data", "self", "--out", "out"];
    lab.fails(&[&dense[..], &SHAPE].concat(), &["a dense model", "convert"]);
    assert!(!lab.path("out").exists());
}

#[test]
fn compare_writes_one_text_for_all_seeds() {
    let lab = Lab::new();
    let more = |seeds| ["--seeds", seeds, "--baselines", "static", "--at", "0.5,1"];
    let written = || {
        let names = fs::read_dir(lab.path("out")).unwrap().map(|entry| entry.unwrap().file_name());
        let names = names.map(|name| name.into_string().unwrap());
        let mut texts: Vec<_> = names.filter(|name| name.starts_with("self-")).collect();
        texts.sort();
        texts
    };
    lab.ok(&own(compare_args("out", &more("1")), "self:900"));
    let first = written();
    assert_eq!(first.len(), 1, "{first:?}");
    lab.ok(&own(compare_args("out", &more("2")), "self:900"));
    assert_eq!(written(), first);
    assert_eq!(fs::read_dir(lab.path("out/cells")).unwrap().count(), 4);
    lab.ok(&own(compare_args("out", &more("1")), "self:901"));
    assert_eq!(written().len(), 2);
    assert_eq!(fs::read_dir(lab.path("out/cells")).unwrap().count(), 6);
}

#[test]
fn a_chat_model_writes_the_answers_that_it_is_trained_on() {
    let lab = Lab::new();
    // the demo's base, which has something to say
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/base");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(base.join(file), lab.path("dense").join(file)).unwrap();
    }
    let template = "{% for m in messages %}{% if m.role == 'user' %}Day{{ m.content }} the {% else %}{{ m.content }}<|endoftext|>{% endif %}{% endfor %}";
    let masked = ["--baselines", "none", "--mask-prompt"];
    // text to measure on has to have prompts, too
    let pair = json!({ "prompt": "Day 214 at ", "completion": "the fruit stall by the harbour." });
    fs::write(lab.path("valid.txt.jsonl"), format!("{pair}\n").repeat(20)).unwrap();
    let args = |data| -> Vec<&str> {
        let args = own(run_args("out", "640", &masked), data);
        args.into_iter().map(|arg| if arg == "valid.txt" { "valid.txt.jsonl" } else { arg }).collect()
    };
    lab.fails(&args("self"), &["--mask-prompt", "no chat template"]);
    assert!(!lab.path("out").exists());
    fs::write(lab.path("dense/chat_template.jinja"), template).unwrap();
    lab.ok(&args("self:600"));
    for record in lines(&lab, "out/training/self.jsonl") {
        let prompt = record["prompt"].as_str().unwrap();
        assert!(prompt.starts_with("Day ") && prompt.contains("the"), "{record}");
        assert!(!record["completion"].as_str().unwrap().is_empty(), "{record}");
    }
}

#[test]
fn only_training_text_is_written() {
    let lab = Lab::new();
    let run = |data| own(run_args("out", "640", &[]), data);
    lab.fails(&run("self:0"), &["self:0", "self:TOKENS", "./self:0"]);
    lab.fails(&run("self:some"), &["self:some", "found \"some\""]);
    lab.fails(&[&run("self")[..], &["--data", "self:7"]].concat(), &["--data self", "twice"]);
    lab.fails(
        &[&run("self")[..], &["--valid", "self"]].concat(),
        &["--valid", "let the model write", "./self"],
    );
    let long: Vec<&str> = run("self").into_iter().map(|arg| if arg == "32" { "65" } else { arg }).collect();
    lab.fails(&long, &["--sequence-length", "64 positions"]);
    for command in [
        &["evaluate", "--model", "dense"][..],
        &["calibrate", "--model", "dense"],
        &["pretrain", "--out", "out"],
    ] {
        lab.fails(
            &[command, &["--data", "self:100"]].concat(),
            &["--data", "let the model write", "./self:100"],
        );
    }
    assert!(!lab.path("out").exists());
}

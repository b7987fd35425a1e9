//! Models, texts and numbers that are refused with one clear error.

use std::fs;
use std::time::{Duration, Instant};

use dynamoe_model::checkpoint::Checkpoint;
use serde_json::{Value, json};

use crate::lab::{Lab, SHAPE, run_args};
use crate::support::contents;

/// Runs what must fail with all of `words`, and leave neither output nor another model than before.
#[track_caller]
fn refuses(lab: &Lab, args: &[&str], words: &[&str]) {
    let before = contents(&lab.path("dense"));
    lab.fails(args, words);
    assert_eq!(contents(&lab.path("dense")), before);
    assert!(!lab.path("out").exists(), "{args:?} left {:?}", contents(&lab.path("out")));
}

/// Changes a JSON file while `body` runs.
fn with_json(lab: &Lab, file: &str, change: impl Fn(&mut Value), body: impl FnOnce()) {
    let path = lab.path(file);
    let good = fs::read(&path).unwrap();
    let mut json: Value = serde_json::from_slice(&good).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    body();
    fs::write(&path, good).unwrap();
}

type Change = fn(&mut Value);

#[test]
fn models_that_are_not_there_are_refused() {
    let lab = Lab::new();
    let started = Instant::now();
    for (model, words) in [
        ("nothing", &["nothing: no such folder"][..]),
        ("train.txt", &["is a file", "folder"]),
        ("org/name", &["org/name", "without a network", "local folder"]),
    ] {
        let args = run_args("out", "640", &[]);
        let args: Vec<&str> = args.into_iter().map(|arg| if arg == "dense" { model } else { arg }).collect();
        refuses(&lab, &args, words);
    }
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn models_that_do_not_fit_together_are_refused() {
    let lab = Lab::new();
    let extra: Change = |tokenizer| {
        let token = json!({ "id": 5000, "content": "<x>", "single_word": false, "lstrip": false,
                            "rstrip": false, "normalized": false, "special": true });
        tokenizer["model"]["vocab"]["<x>"] = json!(5000);
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    };
    let (config, tokenizer) = ("dense/config.json", "dense/tokenizer.json");
    let cases: [(&str, Change, &[&str]); 5] = [
        (config, |c| c["architectures"] = json!(["BertModel"]), &["BertModel", "LlamaForCausalLM", "Qwen3"]),
        (config, |c| c["hidden_size"] = json!("wide"), &["hidden_size"]),
        (config, |c| c["intermediate_size"] = json!(48), &["mlp", "[48, 16]", "[32, 16]"]),
        (tokenizer, extra, &["tokenizer does not fit the embedding", "5000"]),
        (tokenizer, |t| *t = json!({}), &["tokenizer.json", "not a tokenizer"]),
    ];
    for (file, change, words) in cases {
        with_json(&lab, file, change, || refuses(&lab, &run_args("out", "640", &[]), words));
    }

    let weights = lab.path("dense/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    refuses(&lab, &run_args("out", "640", &[]), &["model.safetensors", "truncated"]);
}

#[test]
fn commands_say_whether_they_want_a_dense_model() {
    let lab = Lab::new();
    lab.convert();
    let cases: [(&[&str], &[&str]); 4] = [
        (
            &["run", "--model", "converted", "--data", "train.txt", "--out", "out"],
            &["DynaMoE checkpoint already", "finetune"],
        ),
        (&["convert", "--model", "converted", "--out", "out"], &["DynaMoE checkpoint already"]),
        (&["export", "--model", "dense", "--dense", "--out", "out"], &["dense model already"]),
        (
            &["finetune", "--model", "dense", "--data", "train.txt", "--out", "out"],
            &["a dense model", "convert"],
        ),
    ];
    for (args, words) in cases {
        let shape = if ["run", "finetune"].contains(&args[0]) { &SHAPE[..] } else { &[] };
        refuses(&lab, &[args, shape].concat(), words);
    }
}

#[test]
fn broken_sections_are_refused_by_every_command() {
    let lab = Lab::new();
    lab.convert();
    let cases: [(Change, &[&str]); 3] = [
        (|section| section["version"] = json!(99), &["version 99", "update"]),
        (|section| section["colour"] = json!("red"), &["unknown field", "colour"]),
        (|section| section["expert_widths"] = json!([8, 8, 24, 32]), &["expert_widths", "increasing"]),
    ];
    for (change, words) in cases {
        with_json(
            &lab,
            "converted/config.json",
            |config| change(&mut config["dynamoe"]),
            || {
                refuses(&lab, &["evaluate", "--model", "converted", "--data", "valid.txt"], words);
                refuses(&lab, &["inspect", "converted"], words);
            },
        );
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named_by_every_command() {
    let lab = Lab::new();
    let weights = lab.path("dense/model.safetensors");
    let checkpoint = Checkpoint::open(&lab.path("dense")).unwrap();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let info = checkpoint.info(name).unwrap();
    let place = info.offset as usize + 4 * (info.shape[1] + 3);
    let mut bytes = fs::read(&weights).unwrap();
    bytes[place..place + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let words = [name, "[1, 3]", "NaN or infinite"];
    lab.fails(&["evaluate", "--model", "dense", "--data", "valid.txt"], &words);
    lab.fails(&["calibrate", "--model", "dense", "--data", "train.txt", "--sequence-length", "32"], &words);
    lab.fails(&["convert", "--model", "dense", "--out", "out"], &words);
    lab.fails(&run_args("out", "640", &[]), &words);
}

#[test]
fn wrong_texts_are_refused() {
    let lab = Lab::new();
    let file = |name: &str, bytes: &[u8]| fs::write(lab.path(name), bytes).unwrap();
    file("empty.txt", b"");
    file("blank.txt", b" \n \n");
    file("tiny.txt", b"a word");
    file("latin.txt", b"good text \xe9 bad text");
    file("text.csv", b"a,b");
    file("lines.jsonl", b"{\"text\": \"one\"}\n{\"text\": \n");
    file("fields.jsonl", b"{\"body\": \"one\"}\n");
    file("pairs.jsonl", b"{\"good\": \"one\"}\n");
    let cases: [(&str, &[&str]); 10] = [
        ("nothing.txt", &["nothing.txt", "No such file"]),
        ("empty.txt", &["empty.txt", "empty"]),
        ("blank.txt", &["blank.txt", "document"]),
        ("tiny.txt", &["tiny.txt", "tokens"]),
        ("latin.txt", &["latin.txt", "invalid UTF-8 at byte 10"]),
        ("text.csv", &["text.csv", ".txt", ".jsonl"]),
        ("lines.jsonl", &["lines.jsonl", "line 2"]),
        ("fields.jsonl", &["fields.jsonl", "line 1", "\"text\""]),
        ("train.txt:x", &["train.txt:x", "not a number"]),
        ("train.txt:1e12", &["train.txt", "at most"]),
    ];
    for (data, words) in cases {
        let mut args = run_args("out", "640", &[]);
        args[4] = data;
        lab.fails(&args, words);
        assert!(!lab.path("out").exists(), "{data} left an output folder");
        if !["tiny.txt", "train.txt:1e12"].contains(&data) {
            lab.fails(&["evaluate", "--model", "dense", "--documents", "--data", data], words);
        }
    }
    lab.fails(&run_args("out", "640", &["--pairs", "pairs.jsonl"]), &["pairs.jsonl", "line 1", "bad"]);
    let long: Vec<&str> =
        run_args("out", "640", &[]).iter().map(|&a| if a == "32" { "65" } else { a }).collect();
    lab.fails(&long, &["--sequence-length", "64 positions"]);
    assert!(!lab.path("out").exists());
    lab.fails(&["evaluate", "--model", "dense"], &["--data", "--pairs"]);
}

#[test]
fn wrong_numbers_are_refused() {
    let lab = Lab::new();
    lab.convert();
    let evaluate = ["evaluate", "--model", "converted", "--data", "valid.txt"];
    for (flag, value, word) in [
        ("--sensitivity", "1.5", "sensitivity"),
        ("--sensitivity", "-0.1", "sensitivity"),
        ("--sensitivity", "NaN", "sensitivity"),
        ("--sensitivity", "much", "much"),
        ("--budget", "1.5", "budget"),
        ("--budget", "NaN", "budget"),
        ("--sequence-length", "0", "sequence length"),
    ] {
        let flag = format!("{flag}={value}");
        lab.fails(&[&evaluate[..], &[&flag]].concat(), &[word]);
        assert!(lab.json("converted/config.json")["dynamoe"]["budgets"].as_array().is_none_or(Vec::is_empty));
    }
    let dense = ["evaluate", "--model", "dense", "--data", "valid.txt", "--documents", "--budget", "0.5"];
    lab.fails(&dense, &["dense model", "one width"]);
    for (flag, value, words) in [
        ("--experts", "8,8,32", &["increasing"][..]),
        ("--experts", "8,16", &["32"]),
        ("--experts", "8,64", &["64", "32"]),
        ("--experts", "0,32", &["0"]),
        ("--experts", "four", &["a count, or widths"]),
        ("--separate-shells", "4", &["--separate-shells"]),
        ("--experts", "0", &["experts"]),
        ("--experts", "1", &["two experts"]),
    ] {
        let args = ["convert", "--model", "dense", "--out", "out", flag, value];
        lab.fails(&args, words);
        lab.fails(&run_args("out", "640", &[flag, value]), words);
        assert!(!lab.path("out").exists(), "{flag} {value} left an output folder");
    }
    for (flag, value) in [
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--micro-batch", "0"),
        ("--micro-batch", "3"),
        ("--batch-size", "18446744073709551615"),
        ("--distill", "2"),
        ("--focus", "1.5"),
        ("--set", "full-share=1"),
        ("--set", "log-every=0"),
        ("--set", "clop=1"),
        ("--baselines", "dense,wide"),
    ] {
        lab.fails(&run_args("out", "640", &[flag, value]), &[flag]);
        assert!(!lab.path("out").exists(), "{flag} {value} left an output folder");
    }
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_program_built_for_one_process_refuses_to_be_one_of_several() {
    let lab = Lab::new();
    let args = run_args("out", "640", &[]);
    for [size, rank] in [["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"], ["PMI_SIZE", "PMI_RANK"]] {
        let output = lab.command(&args).env(size, "2").env(rank, "0").output().unwrap();
        crate::lab::refused(output, &args, &["--features mpi"]);
        assert!(!lab.path("out").exists());
    }
    // one process of a launcher is an ordinary one
    let one = lab.command(&["--version"]).env("OMPI_COMM_WORLD_SIZE", "1").output().unwrap();
    assert!(one.status.success());
}

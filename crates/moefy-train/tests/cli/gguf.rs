//! GGUF files wherever a dense model is read.

use candle_core::quantized::GgmlDType;
use dynamoe_model::Checkpoint;

use crate::gguf_files::{Made, text};
use crate::lab::{Lab, run_args};

/// `model.gguf`, which says what the lab's dense model says.
fn write(lab: &Lab, change: impl FnOnce(&mut Made)) {
    let mut made = Made::of(&Checkpoint::open(&lab.path("dense")).unwrap(), GgmlDType::F32);
    made.tokenizer(&lab.json("dense/tokenizer.json"), "smollm");
    change(&mut made);
    made.write(&lab.path("model.gguf"));
}

fn cached(lab: &Lab) -> usize {
    std::fs::read_dir(lab.path("cache/dynamoe/gguf")).map_or(0, Iterator::count)
}

#[test]
fn a_gguf_file_is_read_as_the_folder_that_it_was_made_of() {
    let lab = Lab::new();
    write(&lab, |_| {});
    assert_eq!(lab.loss("model.gguf"), lab.loss("dense"));
    assert_eq!(cached(&lab), 1);
    let told = lab.ok(&["inspect", "model.gguf"]);
    assert!(told.contains("LlamaForCausalLM (dense)") && !told.contains("unused"), "{told}");

    let calibrate = ["calibrate", "--data", "train.txt", "--sequence-length", "32", "--model"];
    lab.ok(&[&calibrate[..], &["dense", "--out", "a.safetensors"]].concat());
    lab.ok(&[&calibrate[..], &["model.gguf", "--out", "b.safetensors"]].concat());
    lab.ok(&["convert", "--model", "dense", "--calibration", "a.safetensors", "--out", "a"]);
    lab.ok(&["convert", "--model", "model.gguf", "--calibration", "b.safetensors", "--out", "b"]);
    assert_eq!(lab.tensors("b"), lab.tensors("a"));
    // what is made of the file needs neither the file nor its cache
    let mut run = run_args("out", "640", &["--train", "added", "--baselines", "none"]);
    run[2] = "model.gguf";
    lab.ok(&run);
    lab.ok(&["export", "--model", "out", "--add-on", "--base", "model.gguf", "--out", "extra"]);
    std::fs::remove_dir_all(lab.path("cache")).unwrap();
    std::fs::remove_file(lab.path("model.gguf")).unwrap();
    let difference = lab.loss("out") - lab.loss("dense");
    assert!(difference.abs() < 1e-5, "neurons in another order: {difference}");
}

#[test]
fn a_gguf_file_that_changes_is_read_anew() {
    let lab = Lab::new();
    write(&lab, |_| {});
    let before = lab.loss("model.gguf");
    write(&lab, |made| made.set("rope.freq_base", candle_core::quantized::gguf_file::Value::F32(100.0)));
    assert_ne!(lab.loss("model.gguf"), before);
    assert_eq!(cached(&lab), 2);
}

#[test]
fn a_gguf_file_whose_tokenizer_is_unknown_takes_one() {
    let lab = Lab::new();
    write(&lab, |made| {
        made.metadata.insert("tokenizer.ggml.pre".into(), text("unheard-of"));
    });
    let evaluate = ["evaluate", "--data", "valid.txt", "--documents", "--model", "model.gguf"];
    lab.fails(&evaluate, &["model.gguf", "unheard-of", "--tokenizer FILE"]);
    lab.fails(&[&evaluate[..], &["--tokenizer", "valid.txt"]].concat(), &["--tokenizer valid.txt"]);
    lab.ok(&[&evaluate[..], &["--tokenizer", "dense/tokenizer.json"]].concat());
    let other = [
        "evaluate",
        "--data",
        "valid.txt",
        "--documents",
        "--model",
        "dense",
        "--tokenizer",
        "dense/tokenizer.json",
    ];
    lab.fails(&other, &["--tokenizer is for a .gguf file"]);
    std::fs::write(lab.path("model.gguf"), "").unwrap();
    lab.fails(&evaluate, &["model.gguf", "cut off"]);
}

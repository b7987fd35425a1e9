//! `export --add-on`: what a model has beyond its base.

use safetensors::Dtype;
use serde_json::Value;

use crate::lab::{Lab, run_args};
use crate::support::contents;

#[test]
fn an_add_on_and_its_base_are_the_model() {
    let lab = Lab::with("LlamaForCausalLM", Dtype::BF16);
    lab.ok(&run_args("out", "1280", &["--train", "added", "--baselines", "none"]));
    let export = ["export", "--model", "out", "--add-on", "--base", "dense", "--out", "extra"];
    lab.ok(&export);
    assert_eq!(contents(&lab.path("extra")).len(), 2, "no tokenizer, no dense weights");
    let dials = ["--sensitivity", "0.3,1", "--budget", "0.5"];
    let mut whole = lab.evaluate("out", &dials);
    let mut joined = lab.evaluate("dense", &[&dials[..], &["--add-on", "extra"]].concat());
    [&mut whole, &mut joined].into_iter().for_each(|found| found["model"] = Value::Null);
    assert_eq!(joined, whole);
    let together = ["--model", "dense", "--add-on", "extra", "--out"];
    lab.ok(&[&["export"], &together[..], &["joined"]].concat());
    assert_eq!(lab.tensors("joined"), lab.tensors("out"));
    assert_eq!(lab.json("joined/config.json"), lab.json("out/config.json"));
    lab.ok(&[&["export", "--dense"], &together[..], &["back"]].concat());
    assert_eq!(lab.tensors("back"), lab.tensors("dense"));
    let width = ["export", "--dense", "--width", "0.5"];
    lab.ok(&[&width[..], &together, &["cut"]].concat());
    lab.ok(&[&width[..], &["--model", "out", "--out", "cut from whole"]].concat());
    assert_eq!(lab.tensors("cut"), lab.tensors("cut from whole"));
    let told = lab.ok(&["inspect", "dense", "--add-on", "extra"]);
    assert!(told.contains("extra") && told.contains("DynaMoE") && !told.contains("unused"), "{told}");
    // new budgets go into the add-on, the base stays as it is
    let dense = contents(&lab.path("dense"));
    let solve = ["--budget", "0.6", "--calibration-data", "train.txt", "--add-on", "extra"];
    lab.evaluate("dense", &solve);
    let rows = lab.json("extra/add_on.json")["dynamoe"]["budgets"].clone();
    let solved = |row: &Value| (row["width"].as_f64().unwrap() - 0.6).abs() < 0.01;
    assert!(rows.as_array().unwrap().iter().any(solved), "{rows}");
    assert_eq!(contents(&lab.path("dense")), dense);

    let other = ["--model", "back", "--add-on", "extra", "--data", "valid.txt", "--documents"];
    lab.ok(&[&["evaluate", "--sensitivity", "1"], &other[..]].concat());
    lab.ok(&run_args("tuned", "1280", &["--baselines", "none"]));
    lab.fails(
        &["export", "--model", "tuned", "--add-on", "--base", "dense", "--out", "no"],
        &["--train added"],
    );
    lab.ok(&["export", "--model", "tuned", "--dense", "--out", "other"]);
    lab.fails(
        &["evaluate", "--model", "other", "--add-on", "extra", "--data", "valid.txt"],
        &["extra", "belongs to dense", "other is another model"],
    );
    lab.fails(&["export", "--model", "out", "--add-on", "--out", "no"], &["--base"]);
    lab.fails(&export, &["exists", "--force"]);
    lab.ok(&[&export[..], &["--force"]].concat());
    assert!(!lab.path("no").exists());
}

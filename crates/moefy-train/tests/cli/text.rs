//! Text in folders, patterns and conversations, as the commands take it.

use std::fs;

use serde_json::json;

use crate::lab::{Lab, SHAPE};

#[test]
fn text_is_taken_from_a_folder_and_with_the_models_template() {
    let lab = Lab::new();
    let text = fs::read_to_string(lab.path("valid.txt")).unwrap();
    let score = |data: &str, more: &[&str]| {
        let args =
            ["evaluate", "--model", "dense", "--data", data, "--documents", "--json", "--sensitivity", "1"];
        let found: serde_json::Value = serde_json::from_str(&lab.ok(&[&args[..], more].concat())).unwrap();
        (found["results"][0]["tokens"].as_u64().unwrap(), found["results"][0]["loss"].as_f64().unwrap())
    };
    let whole = score("valid.txt", &[]);
    fs::create_dir(lab.path("parts")).unwrap();
    for (number, document) in text.split("<|endoftext|>").enumerate() {
        fs::write(lab.path(&format!("parts/{number}.jsonl")), json!({"text": document}).to_string()).unwrap();
    }
    assert_eq!(score("parts", &[]), whole);
    assert_eq!(score("parts/*.jsonl", &[]), whole);
    fs::write(lab.path("dense/chat_template.jinja"), "{% for m in messages %}{{ m.content }}{% endfor %}")
        .unwrap();
    let lines: Vec<String> = text
        .split("<|endoftext|>")
        .map(|document| {
            let (first, second) = document.split_at(document.find(' ').unwrap());
            let says = |role: &str, content: &str| json!({"role": role, "content": content});
            json!({"messages": [says("user", first), says("assistant", second)]}).to_string()
        })
        .collect();
    fs::write(lab.path("chat.jsonl"), lines.join("\n")).unwrap();
    assert_eq!(score("chat.jsonl", &[]), whole);
    // in training too, with a weight
    let train =
        ["run", "--model", "dense", "--data", "parts:2", "--data", "train.txt", "--valid", "chat.jsonl"];
    let more = ["--tokens", "256", "--baselines", "none", "--out", "out"];
    lab.ok(&[&train[..], &SHAPE, &more].concat());
    let score = ["evaluate", "--model", "dense", "--documents", "--data"];
    lab.fails(&[&score[..], &["parts/*.txt"]].concat(), &["parts/*.txt", "no files"]);
    let words = ["chat.jsonl: line 1", "the field \"text\""];
    lab.fails(&[&score[..], &["chat.jsonl", "--field", "text"]].concat(), &words);
}

//! `--mask-prompt`: the loss of answers alone.

use std::fs;

use serde_json::{Value, json};

use crate::lab::{Lab, SHAPE, STEP, kill_when, run_args};

/// The lab with the chat template of ChatML and conversations in `chat.jsonl`.
fn lab() -> Lab {
    let lab = Lab::new();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    fs::write(lab.path("dense/chat_template.jinja"), template).unwrap();
    let lines: Vec<String> = (0..200)
        .map(|n| {
            let question = format!("What is the price of {n} apples at the stall?");
            let said = |role: &str, content: String| json!({ "role": role, "content": content });
            let messages = [
                said("user", question),
                said("assistant", format!("{} coins.", 3 * n)),
                said("user", "And of a pear?".into()),
                said("assistant", "Two coins, as ever.".into()),
            ];
            json!({ "messages": messages }).to_string()
        })
        .collect();
    fs::write(lab.path("chat.jsonl"), lines.join("\n")).unwrap();
    lab
}

fn write_lines(lab: &Lab, name: &str, lines: &[Value]) {
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(lab.path(name), lines.join("\n")).unwrap();
}

#[test]
fn only_answers_are_scored() {
    let lab = lab();
    let pairs = [("Day 214 at ", "the fruit stall."), ("Tom bought", " plums and figs.")];
    let parts = pairs.map(|(prompt, completion)| json!({ "prompt": prompt, "completion": completion }));
    write_lines(&lab, "parts.jsonl", &parts);
    let evaluate = |data: &str, more: &[&str]| -> Value {
        let args = ["evaluate", "--model", "dense", "--data", data, "--documents", "--json"];
        serde_json::from_str::<Value>(&lab.ok(&[&args[..], more].concat())).unwrap()["results"][0].clone()
    };
    let tokens = |point: &Value| point["tokens"].as_u64().unwrap();
    let (whole, masked) = (evaluate("parts.jsonl", &[]), evaluate("parts.jsonl", &["--mask-prompt"]));
    let prompts = pairs.map(|(prompt, _)| json!({ "text": prompt }));
    write_lines(&lab, "prompts.jsonl", &prompts);
    // a document that stands alone has a closing token besides
    let alone = tokens(&evaluate("prompts.jsonl", &[]));
    assert_eq!(tokens(&masked), tokens(&whole) - (alone - 2), "{whole} {masked}");
    assert_ne!(whole["loss"], masked["loss"]);
    let chat = tokens(&evaluate("chat.jsonl", &["--mask-prompt"]));
    assert!(chat < tokens(&evaluate("chat.jsonl", &[])) / 2 && chat > 200 * 5, "{chat}");
}

#[test]
fn text_without_parts_has_no_prompt() {
    let lab = lab();
    write_lines(&lab, "text.jsonl", &[json!({ "text": "a" })]);
    write_lines(&lab, "asks.jsonl", &[json!({ "messages": [{ "role": "user", "content": "Hi" }] })]);
    let fails = |data: &str, more: &[&str], words: &[&str]| {
        let args = ["evaluate", "--model", "dense", "--documents", "--mask-prompt", "--data", data];
        lab.fails(&[&args[..], more].concat(), words);
    };
    fails("valid.txt", &[], &["valid.txt: plain text has no prompt to mask", "\"messages\""]);
    fails("text.jsonl", &[], &["line 1: expected a JSON object with the field \"prompt\" and"]);
    fails("chat.jsonl", &["--field", "id"], &["plain text has no prompt to mask"]);
    fails("asks.jsonl", &[], &["line 1: expected a message with the role \"assistant\""]);
    fs::write(
        lab.path("dense/chat_template.jinja"),
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    )
    .unwrap();
    fails("chat.jsonl", &[], &["line 1: the model's chat template", "differently when more follow"]);
}

/// Every answer's tokens weigh the same, whichever sequences are computed together.
#[test]
fn accumulated_batches_of_unlike_counts_make_the_same_step() {
    let lab = lab();
    lab.convert();
    let args =
        ["finetune", "--model", "converted", "--data", "chat.jsonl", "--mask-prompt", "--tokens", "640"];
    for (out, micro) in [("one", "4"), ("two", "1")] {
        let shape = [&SHAPE[..], &["--micro-batch", micro, "--method", "dense", "--out", out]].concat();
        lab.ok(&[&args[..], &shape].concat());
    }
    let largest = lab.largest_difference("one", "two");
    assert!(largest < 1e-4, "{largest}");
    assert!(lab.tensors("one") != lab.tensors("converted"));
}

#[test]
fn a_masked_run_resumes_to_the_same_bits() {
    let lab = lab();
    let tokens = (24 * STEP).to_string();
    let data = |out: &'static str, more: &[&'static str]| -> Vec<String> {
        let base = ["run", "--model", "dense", "--data", "chat.jsonl", "--mask-prompt", "--out", out];
        let args =
            [&base[..], &["--tokens", &tokens, "--save-every", "3", "--baselines", "none"], &SHAPE, more];
        args.concat().into_iter().map(str::to_owned).collect()
    };
    let call = |args: &[String]| lab.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    call(&data("whole", &[]));
    let killed = data("killed", &["--resume"]);
    let args: Vec<&str> = killed.iter().map(String::as_str).collect();
    kill_when(&lab, &args, &lab.path("killed/training/state/step-00000006"));
    // what decides the result has to be the same
    let without: Vec<&str> = args.iter().copied().filter(|arg| *arg != "--mask-prompt").collect();
    lab.fails(&without, &["mask-prompt: was true, now false"]);
    call(&killed);
    let model = |out: &str| fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(model("whole") == model("killed"));
    // and the mask decides it
    let plain = ["run", "--model", "dense", "--data", "chat.jsonl", "--out", "plain", "--baselines", "none"];
    lab.ok(&[&plain[..], &["--tokens", &tokens, "--save-every", "3"], &SHAPE].concat());
    assert!(model("whole") != model("plain"));
    let masked = run_args("text", &tokens, &["--mask-prompt"]);
    lab.fails(&masked, &["train.txt: plain text has no prompt to mask"]);
}

//! The dial in a model's name, and a dial for each phase.

#[path = "support/http.rs"]
mod http;
mod support;

use http::{Server, chat, completion, with};
use serde_json::{Value, json};
use support::{Checkpoints, SMALL, checkpoints, edit_json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn width_of(answer: &Value) -> f64 {
    answer["usage"]["mean_ffn_width"].as_f64().unwrap_or_else(|| panic!("no width in {answer}"))
}

#[test]
fn the_dial_may_be_a_part_of_the_models_name() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 51);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let models: Value = server.get("/v1/models").json().unwrap();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["default", "dynamoe", "dynamoe@0.75", "dynamoe@0.5"]);
    let ask = |name: &str| server.json(TEXT, &with(completion("Hello", 8), "model", name));
    for name in names {
        let answer = ask(name);
        assert_eq!(answer["model"], name);
    }
    assert_eq!(width_of(&ask("dynamoe@s0")), 0.25);
    assert_eq!(width_of(&ask("default@s1")), 1.0);
    assert_eq!(width_of(&ask("dynamoe@1")), 1.0);
    let by_field = server.json(TEXT, &with(completion("Hello", 8), "budget", 0.6));
    let by_name = ask("dynamoe@0.6");
    assert_eq!((&by_name["choices"], width_of(&by_name)), (&by_field["choices"], width_of(&by_field)));
    for (name, status, word) in
        [("gpt-4", 404, "dynamoe@0.75"), ("gpt-4@0.5", 404, "gpt-4@0.5"), ("dynamoe@2", 400, "model")]
    {
        let refused = server.post(CHAT, &with(chat("x", 1), "model", name));
        assert_eq!(refused.status(), status, "{name}");
        let text = refused.text().unwrap();
        assert!(text.contains(word), "{text}");
    }
    let both = server.post(TEXT, &with(with(completion("x", 1), "model", "dynamoe@0.5"), "sensitivity", 0.5));
    assert_eq!(both.status(), 400);
    assert!(both.text().unwrap().contains("not both"));
}

/// A model whose template has think tags, which are seven and eight tokens of a byte each.
fn thinker() -> Checkpoints {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 52);
    edit_json(&checkpoints.dynamoe(), "tokenizer_config.json", |json| {
        json["chat_template"] =
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{% if enable_thinking %}<think>{% endif %}".into();
    });
    checkpoints
}

#[test]
fn each_phase_may_have_a_dial_of_its_own() {
    let checkpoints = thinker();
    let server = Server::start(&checkpoints.dynamoe(), &["--prefix-cache", "16"]);
    // 4 tokens of the prompt and 7 of the opening tag; 6 thoughts, the closing tag, 5 tokens of the answer
    let answer_is = |grammar: &str, thinks: bool, dial: Value| {
        let body = with(
            with(chat("Once", 40), "grammar", json!({"type": "regex", "value": grammar})),
            "sensitivity",
            dial,
        );
        server.json(CHAT, &with(body, "enable_thinking", thinks))
    };
    let thoughts = "hmhmhm</think>done!";
    let answer = answer_is(thoughts, true, json!({"prompt": 1, "thinking": 0, "answer": 1}));
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hmhmhm"), &json!("done!")));
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(11), &json!(20)));
    // all that is written is computed but the token that ends it; the closing tag's last letter ends the thoughts
    let (narrow, wide) = (6.0 + 7.0, 11.0 + 1.0 + 5.0);
    let expected = (0.25 * narrow + wide) / (narrow + wide);
    assert!((width_of(&answer) - expected).abs() < 1e-9, "{answer}, {expected}");
    let answer = answer_is(thoughts, true, json!({"prompt": 0, "thinking": 0, "answer": 1}));
    assert!((width_of(&answer) - (0.25 * 24.0 + 6.0) / 30.0).abs() < 1e-9, "{answer}");
    // an answer without thoughts
    let answer = answer_is("done!", false, json!({"prompt": 0, "thinking": 0, "answer": 1}));
    assert!((width_of(&answer) - (0.25 * 4.0 + 5.0) / 9.0).abs() < 1e-9, "{answer}");
    // a phase that is left out has the default
    let answer = answer_is("done!", false, json!({"prompt": 1}));
    assert!(width_of(&answer) < 1.0, "{answer}");
    let streamed = with(
        with(chat("Once", 40), "grammar", json!({"type": "regex", "value": thoughts})),
        "enable_thinking",
        true,
    );
    let text = |field: &str| -> String {
        let events = server.stream(CHAT, &streamed);
        events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((text("reasoning_content"), text("content")), ("hmhmhm".into(), "done!".into()));
}

#[test]
fn keys_of_one_phase_are_not_taken_for_anothers() {
    let checkpoints = thinker();
    let cached = Server::start(&checkpoints.dynamoe(), &[]);
    let fresh = Server::start(&checkpoints.dynamoe(), &["--prefix-cache", "0"]);
    let mixed = json!({"prompt": 1, "answer": 0});
    let first = cached.json(TEXT, &with(completion("Once upon a time", 24), "sensitivity", mixed.clone()));
    // what was written by the small expert is now a prompt of the large one
    let prompt = format!("Once upon a time{}", first["choices"][0]["text"].as_str().unwrap());
    for dial in [json!(1), mixed] {
        let body = with(completion(&prompt, 16), "sensitivity", dial);
        assert_eq!(cached.json(TEXT, &body)["choices"], fresh.json(TEXT, &body)["choices"]);
    }
}

#[test]
fn a_wrong_dial_of_a_phase_is_refused_by_name() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 53);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for (dial, word) in [
        (json!({"prompt": 2}), "sensitivity.prompt"),
        (json!({"answer": "x"}), "sensitivity.answer"),
        (json!({"reply": 1}), "reply"),
        (json!({"thinking": 1}), "sensitivity.thinking: the model has no think tags"),
    ] {
        let refused = server.post(TEXT, &with(completion("x", 1), "sensitivity", dial));
        assert_eq!(refused.status(), 400);
        let text = refused.text().unwrap();
        assert!(text.contains(word), "{text}");
    }
}

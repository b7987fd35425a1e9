//! Text completions as evaluation harnesses use them.

#[path = "support/http.rs"]
mod http;
mod support;

use std::path::Path;

use candle_core::{Device, Tensor};
use dynamoe_model::{Checkpoint, RoutedModel};
use http::{Server, completion, with};
use serde_json::{Value, json};
use support::{SMALL, VOCAB_SIZE, checkpoints, numbers};

const TEXT: &str = "/v1/completions";
/// Nats.
const TOLERANCE: f64 = 1e-3;

/// Natural logarithms of the trainer's distribution of the token after each of `tokens`.
fn trainers(model: &RoutedModel, tokens: &[u32], sensitivity: f64) -> Vec<Vec<f64>> {
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (hidden, _) = model.forward(&input, &vec![sensitivity; model.config().num_hidden_layers]).unwrap();
    let logits = numbers(&model.logits(&hidden).unwrap());
    let of_row = |row: &[f32]| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        row.iter().map(|&logit| f64::from(logit) - sum.ln()).collect()
    };
    logits.chunks_exact(VOCAB_SIZE).map(of_row).collect()
}

/// What lm-evaluation-harness sends to score a text.
fn scored(prompt: Value, sensitivity: f64) -> Value {
    json!({"model": "dynamoe", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true,
           "seed": 1234, "sensitivity": sensitivity})
}

fn numbers_of(values: &Value) -> Vec<Option<f64>> {
    values.as_array().unwrap().iter().map(Value::as_f64).collect()
}

#[test]
fn the_log_probabilities_of_a_prompt_are_the_trainers() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 61);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let checkpoint = Checkpoint::open(Path::new(&checkpoints.dynamoe())).unwrap();
    let model = RoutedModel::load(&checkpoint, &Device::Cpu).unwrap();
    let text = "The quick brown fox, é";
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    for sensitivity in [0.4, 0.5, 1.0] {
        // the second time its tokens may be in the cache
        server.json(TEXT, &with(completion(text, 4), "sensitivity", sensitivity));
        for prompt in [json!(text), json!(tokens), json!([tokens])] {
            let answer = server.json(TEXT, &scored(prompt, sensitivity));
            let choice = &answer["choices"][0];
            let told = &choice["logprobs"];
            let expected = trainers(&model, &tokens, sensitivity);
            let logprobs = numbers_of(&told["token_logprobs"]);
            assert_eq!((logprobs.len(), logprobs[0]), (tokens.len() + 1, None));
            for (n, &token) in tokens.iter().enumerate().skip(1) {
                let (ours, theirs) = (logprobs[n].unwrap(), expected[n - 1][token as usize]);
                assert!((ours - theirs).abs() < TOLERANCE, "{n}: {ours}, {theirs}");
                let best = expected[n - 1].iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let top = told["top_logprobs"][n].as_object().unwrap();
                let likeliest =
                    top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
                assert!((likeliest - best).abs() < TOLERANCE && top.len() <= 2, "{top:?}");
            }
            let best = expected[tokens.len() - 1].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!((logprobs[tokens.len()].unwrap() - best).abs() < TOLERANCE);
            assert!(choice["text"].as_str().unwrap().starts_with(text));
            assert_eq!(told["text_offset"].as_array().unwrap().len(), tokens.len() + 1);
            assert_eq!((&told["tokens"][0], &told["text_offset"][3]), (&json!("T"), &json!(3)));
            // two bytes are one letter
            assert_eq!(told["text_offset"].as_array().unwrap().last().unwrap(), text.chars().count());
            assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
        }
    }
    // a token that ends the answer is told like any other
    let ended = with(scored(json!(text), 1.0), "logit_bias", json!({"257": 100}));
    let answer = server.json(TEXT, &ended);
    let told = &answer["choices"][0]["logprobs"];
    assert_eq!(told["tokens"].as_array().unwrap().len(), tokens.len() + 1);
    assert_eq!(
        (&told["tokens"][tokens.len()], &answer["choices"][0]["text"]),
        (&json!("</s>"), &json!(text))
    );
    // nothing need be written
    let answer = server.json(TEXT, &with(scored(json!(text), 1.0), "max_tokens", 0));
    assert_eq!(answer["choices"][0]["text"], text);
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), tokens.len());
}

#[test]
fn log_probabilities_are_the_models_at_every_temperature() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 62);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let checkpoint = Checkpoint::open(Path::new(&checkpoints.dynamoe())).unwrap();
    let model = RoutedModel::load(&checkpoint, &Device::Cpu).unwrap();
    let expected = trainers(&model, &"Once".bytes().map(u32::from).collect::<Vec<_>>(), 1.0);
    let mut best = expected[3].clone();
    best.sort_by(|a, b| b.total_cmp(a));
    for (field, value) in [("temperature", 0.0), ("temperature", 0.7), ("temperature", 1.7), ("top_p", 0.3)] {
        let body = with(with(completion("Once", 1), "logprobs", 5), "sensitivity", 1.0);
        let answer = server.json(TEXT, &with(body, field, value));
        let told = &answer["choices"][0]["logprobs"];
        let mut top: Vec<f64> = told["top_logprobs"][0]
            .as_object()
            .unwrap()
            .values()
            .map(|value| value.as_f64().unwrap())
            .collect();
        top.sort_by(|a, b| b.total_cmp(a));
        assert!(
            top.len() >= 5 && top.iter().zip(&best).take(5).all(|(a, b)| (a - b).abs() < TOLERANCE),
            "{told}"
        );
        let own = told["token_logprobs"][0].as_f64().unwrap();
        assert!(expected[3].iter().any(|theirs| (own - theirs).abs() < TOLERANCE));
    }
}

#[test]
fn several_prompts_are_answered_in_order() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 63);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let texts = ["Once", "upon a time", "x"];
    let alone: Vec<Value> = texts
        .iter()
        .map(|text| server.json(TEXT, &completion(text, 6))["choices"][0]["text"].clone())
        .collect();
    let tokens = texts.map(|text| text.bytes().collect::<Vec<u8>>());
    for prompt in [json!(texts), json!(tokens)] {
        let body = with(with(completion("", 6), "prompt", prompt), "n", 2);
        let answer = server.json(TEXT, &body);
        let choices = answer["choices"].as_array().unwrap();
        for (n, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], &choice["text"]), (&json!(n), &alone[n / 2]));
        }
        assert_eq!((choices.len(), &answer["usage"]["prompt_tokens"]), (6, &json!(16)));
        let events = server.stream(TEXT, &body);
        for n in 0..6 {
            let own = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == n);
            let text: String = own.filter_map(|choice| choice["text"].as_str()).collect();
            assert_eq!(text, alone[n / 2].as_str().unwrap());
        }
    }
    for (prompt, word) in [
        (json!([]), "prompt: expected at least one"),
        (json!(""), "prompt: has 0 tokens"),
        (json!([[]]), "prompt: has 0 tokens"),
        (json!([99_999]), "prompt: expected ids"),
        (json!([-1]), "prompt"),
        (json!([1.5]), "prompt"),
        (json!(["a", 1]), "prompt"),
        (json!({"text": "a"}), "prompt"),
        (json!(vec!["a"; 1000]), "prompt: expected at most"),
    ] {
        let refused = server.post(TEXT, &with(completion("", 6), "prompt", prompt));
        assert_eq!(refused.status(), 400, "{word}");
        let text = refused.text().unwrap();
        assert!(text.contains(word), "{text}");
    }
}

/// Prompts whose logits are asked for share no step with others, and hold nobody up for ever.
#[test]
fn scoring_and_writing_go_on_side_by_side() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 64);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let text = "It was late, and all the others slept";
    let score = || server.json(TEXT, &scored(json!([text, "short"]), 0.5))["choices"].clone();
    let write = || server.json(TEXT, &completion(text, 20))["choices"].clone();
    let (scored, written) = (score(), write());
    std::thread::scope(|scope| {
        for n in 0..24 {
            let (score, write, scored, written) = (&score, &write, &scored, &written);
            scope.spawn(move || match n % 2 {
                0 => assert_eq!(score(), *scored),
                _ => assert_eq!(write(), *written),
            });
        }
    });
}

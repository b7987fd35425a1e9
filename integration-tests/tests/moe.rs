//! The dial of ordinary MoE models: how many of its experts a token runs.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/http.rs"]
mod http;
#[path = "support/moe.rs"]
mod moe;
mod support;

use std::{path::Path, process::Command, sync::Arc, thread};

use candle_core::Tensor;
use dynamoe_mistralrs::Dial;
use engine::{build, plain};
use http::{Server, chat, completion, with};
use mistralrs::{
    CustomLogitsProcessor,
    core::row_data::{ExpertChoice, RowData},
};
use moe::fixtures;
use serde_json::{Value, json};
use support::{VOCAB_SIZE, largest_difference};

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
/// Sums of f32 in another order, for logits of size 1 to 10.
const TOLERANCE: f32 = 1e-4;

/// A request whose tokens run this many experts.
struct Experts(usize);

impl RowData for Experts {
    fn expert_choice(&self) -> Option<&dyn ExpertChoice> {
        Some(self)
    }
}

impl ExpertChoice for Experts {
    fn experts_to_run(&self, weights: &[f32]) -> usize {
        assert!(weights.is_sorted_by(|a, b| a >= b), "{weights:?}");
        self.0
    }
}

struct Carrier(Arc<Experts>);

impl CustomLogitsProcessor for Carrier {
    fn apply(&self, logits: &Tensor, _: &[u32]) -> candle_core::Result<Tensor> {
        Ok(logits.clone())
    }

    fn row_data(&self) -> Option<Arc<dyn RowData>> {
        Some(self.0.clone())
    }
}

fn last(logits: &[f32]) -> &[f32] {
    &logits[logits.len() - VOCAB_SIZE..]
}

#[tokio::test]
async fn fewer_experts_are_transformers_with_a_lower_num_experts_per_tok() {
    let fixtures = fixtures();
    let mut wrong = Vec::new();
    for fixture in fixtures.all() {
        let name = &fixture.name;
        let mut compare = |what: String, found: &[f32], experts: usize| {
            let difference = largest_difference(last(found), &fixture.logits(experts));
            if difference >= TOLERANCE {
                wrong.push(format!("{name}, {what}: {difference}"));
            }
        };
        let folder = fixture.write();
        let engine = build(plain(folder.path().to_str().unwrap())).await;
        for experts in 1..=fixture.experts_per_token {
            let carrier = Arc::new(Carrier(Arc::new(Experts(experts))));
            let found = engine.token_logits_with(&fixtures.tokens, Some(carrier)).await;
            compare(format!("{experts} experts"), &found, experts);
        }
        let first = engine.token_logits(&fixtures.tokens, Some(Dial::Sensitivity(0.0))).await;
        compare("sensitivity 0".into(), &first, 1);
        // the default is the model as it is
        let plain = engine.token_logits(&fixtures.tokens, None).await;
        assert_eq!(
            plain,
            engine.token_logits(&fixtures.tokens, Some(Dial::Sensitivity(1.0))).await,
            "{name}"
        );
        let full = Arc::new(Carrier(Arc::new(Experts(usize::MAX))));
        assert_eq!(plain, engine.token_logits_with(&fixtures.tokens, Some(full)).await, "{name}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_sensitivity_is_a_threshold_for_the_weights_of_experts() {
    let fixtures = fixtures();
    for name in ["qwen3moe", "qwen3moe-unnormalized"] {
        let fixture = fixtures.get(name);
        let folder = fixture.write();
        let engine = build(plain(folder.path().to_str().unwrap())).await;
        assert!(!fixture.sensitivities().is_empty());
        for (sensitivity, expected) in fixture.sensitivities() {
            let found = engine.token_logits(&fixtures.tokens, Some(Dial::Sensitivity(sensitivity))).await;
            let difference = largest_difference(last(&found), &expected);
            assert!(difference < TOLERANCE, "{name}, {sensitivity}: {difference}");
        }
    }
}

#[tokio::test]
async fn quantized_experts_have_the_dial_too() {
    let fixtures = fixtures();
    let folder = fixtures.get("qwen3moe").write();
    let builder = plain(folder.path().to_str().unwrap()).with_isq(mistralrs::IsqType::Q8_0);
    let engine = build(builder).await;
    let full = engine.token_logits(&fixtures.tokens, None).await;
    assert_eq!(full, engine.token_logits(&fixtures.tokens, Some(Dial::Sensitivity(1.0))).await);
    let first = engine.token_logits(&fixtures.tokens, Some(Dial::Sensitivity(0.0))).await;
    let expected = fixtures.get("qwen3moe");
    // 8 bits: a step is a 254th of a block's largest number, and 32 of them are summed in each of the layers' matrices
    assert!(largest_difference(last(&full), &expected.logits(3)) < 0.1);
    assert!(largest_difference(last(&first), &expected.logits(1)) < 0.1);
    assert!(largest_difference(last(&first), last(&full)) > 0.1, "another dial, another answer");
}

fn experts_of(answer: &Value) -> f64 {
    answer["usage"]["mean_experts"].as_f64().unwrap_or_else(|| panic!("no experts in {answer}"))
}

fn metric(server: &Server, line: &str) -> f64 {
    let metrics = server.get("/metrics").text().unwrap();
    let found = metrics.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("no {line} in {metrics}"))
}

#[test]
fn a_request_says_how_many_experts_its_tokens_run() {
    let folder = fixtures().get("qwen3moe").write();
    let server = Server::start(folder.path().to_str().unwrap(), &[]);
    let ask =
        |field: &str, value: Value| server.json(TEXT, &with(completion("Hello there", 8), field, value));
    let full = server.json(TEXT, &completion("Hello there", 8));
    assert_eq!(experts_of(&full), 3.0);
    assert_eq!(full["choices"], ask("sensitivity", 1.into())["choices"]);
    assert_eq!(experts_of(&ask("sensitivity", 0.into())), 1.0);
    let some = experts_of(&ask("sensitivity", 0.5.into()));
    assert!(some > 1.0 && some < 3.0, "{some}");
    // each phase has a dial of its own: 11 tokens of the prompt are computed, and 7 of the answer
    let prompt = experts_of(&ask("sensitivity", json!({"prompt": 0, "answer": 1})));
    assert!((prompt - (11.0 + 7.0 * 3.0) / 18.0).abs() < 1e-9, "{prompt}");
    let named = server.json(TEXT, &with(completion("Hello there", 8), "model", "default@s0"));
    assert_eq!(experts_of(&named), 1.0);
    // streams tell the experts of their tokens
    let body =
        with(with(chat("Hello", 5), "sensitivity", 0), "stream_options", json!({"include_usage": true}));
    let events = server.stream(CHAT, &body);
    let told: Vec<f64> = events.iter().filter_map(|event| event["choices"][0]["experts"].as_f64()).collect();
    assert!(!told.is_empty() && told.iter().all(|&experts| experts == 1.0), "{told:?}");
    assert_eq!(experts_of(events.last().unwrap()), 1.0);

    let told: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!((&told["experts"], &told["experts_per_token"]), (&json!(6), &json!(3)));
    assert_eq!((&told["sensitivity"], &told["budgets"]), (&json!(1.0), &json!([])));
    let budget = server.post(TEXT, &with(completion("x", 1), "budget", 0.5));
    assert_eq!(budget.status(), 400);
    assert!(budget.text().unwrap().contains("dynamoe-budgets"));
    let counts: f64 =
        (1..=3).map(|n| metric(&server, &format!("dynamoe_experts_used_total{{experts=\"{n}\"}}"))).sum();
    let tokens =
        metric(&server, "dynamoe_prompt_tokens_total") + metric(&server, "dynamoe_answer_tokens_total");
    // two layers; the last token of an answer is not computed, and prompts are taken from the cache in part
    assert!(counts > 0.0 && counts <= 2.0 * tokens, "{counts} {tokens}");
    let mean = metric(&server, "dynamoe_mean_experts");
    assert!(mean > 1.0 && mean < 3.0, "{mean}");
    // the default may be set
    let set = server
        .client
        .put(format!("{}/v1/dynamoe", server.url))
        .json(&json!({"sensitivity": 0}))
        .send()
        .unwrap();
    assert!(set.status().is_success());
    assert_eq!(experts_of(&server.json(TEXT, &completion("Hello there", 8))), 1.0);
}

#[test]
fn clients_with_different_dials_share_batches() {
    let folder = fixtures().get("qwen3moe").write();
    let server = Server::start(folder.path().to_str().unwrap(), &["--prefix-cache", "4"]);
    let bodies: Vec<Value> = (0..16)
        .map(|client| {
            let body = completion(&format!("Client {} asks", client % 5), 24);
            with(body, "sensitivity", f64::from(client % 4) / 3.0)
        })
        .collect();
    let alone: Vec<Value> = bodies.iter().map(|body| server.json(TEXT, body)["choices"].take()).collect();
    let (server, alone, bodies) = (&server, &alone, &bodies);
    thread::scope(|scope| {
        for _ in 0..2 {
            for (body, alone) in bodies.iter().zip(alone) {
                scope.spawn(move || assert_eq!(server.json(TEXT, body)["choices"], *alone, "{body}"));
            }
        }
    });
    let distinct: std::collections::BTreeSet<String> = alone.iter().map(Value::to_string).collect();
    assert!(distinct.len() > 5, "the dial makes a difference: {distinct:?}");
}

fn solve(folder: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_budgets"))
        .args(["--cpu", "--model", folder.to_str().unwrap()])
        .args(arguments)
        .env("RUST_LOG", "warn")
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_table_of_budgets_is_solved_on_text() {
    let folder = fixtures().get("qwen3moe").write();
    let text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. ".repeat(20);
    let data = folder.path().join("text.txt");
    std::fs::write(&data, &text).unwrap();
    let data = data.to_str().unwrap();
    let small = ["--data", data, "--tokens", "1024", "--sequence-length", "100", "--budget", "0.2,0.5,0.8"];
    let (solved, said) = solve(folder.path(), &small);
    assert!(solved, "{said}");
    let file = folder.path().join("dynamoe_budgets.json");
    let table: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let widths: Vec<f64> =
        table["budgets"].as_array().unwrap().iter().map(|row| row["width"].as_f64().unwrap()).collect();
    // one of three experts is more than a fifth of them, so there is no row for it
    assert_eq!(widths.len(), 2, "{table}");
    assert!((widths[0] - 0.5).abs() < 0.005 && (widths[1] - 0.8).abs() < 0.005, "{table}");
    // nothing is overwritten unasked
    let (again, said) = solve(folder.path(), &small);
    assert!(!again && said.contains("--force"), "{said}");

    // the server finds it, and answers in a new context use what was asked for
    let server = Server::start(folder.path().to_str().unwrap(), &["--prefix-cache", "0"]);
    let models = server.get("/v1/models").text().unwrap();
    assert!(models.contains(&format!("@{}", widths[0])), "{models}");
    let answer = server.json(TEXT, &with(completion(&text[..100], 1), "budget", 0.5));
    assert!((experts_of(&answer) / 3.0 - 0.5).abs() < 0.06, "{answer}");
    drop(server);

    // a default budget may follow the load; nobody waits here, so it stays at the largest
    let arguments = ["--adaptive", "0.5..0.8", "--target-itl-ms", "10000"];
    let server = Server::start(folder.path().to_str().unwrap(), &arguments);
    let told: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!((&told["budget"], &told["adaptive"]["min"]), (&json!(0.8), &json!(0.5)));
    let answer = server.json(TEXT, &completion(&text[..100], 1));
    assert!((experts_of(&answer) / 3.0 - 0.8).abs() < 0.06, "{answer}");
    drop(server);

    // a table of another model is refused
    std::fs::write(&file, table.to_string().replace("\"experts_per_token\":3", "\"experts_per_token\":8"))
        .unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_serve"))
        .args(["--port", "0", "--cpu", "--model", folder.path().to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("belongs to another model"), "{said}");
}

#[test]
fn a_table_is_not_solved_for_what_has_no_experts() {
    let dense = support::checkpoints("LlamaForCausalLM", support::SMALL, 5);
    let data = dense.folder().join("text.txt");
    std::fs::write(&data, "some text").unwrap();
    for model in [dense.dense(), dense.dynamoe()] {
        let (solved, said) = solve(Path::new(&model), &["--data", data.to_str().unwrap()]);
        assert!(!solved && said.contains("is no MoE model"), "{said}");
    }
    let (solved, said) = solve(Path::new(&dense.dense()), &["--data", "/nowhere"]);
    assert!(!solved && said.contains("/nowhere"), "{said}");
    let (solved, said) =
        solve(Path::new(&dense.dense()), &["--data", data.to_str().unwrap(), "--budget", "1.5"]);
    assert!(!solved && said.contains("--budget"), "{said}");
}

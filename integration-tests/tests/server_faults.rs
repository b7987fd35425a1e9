//! `dynamoe-serve` over real HTTP where clients leave, contexts end and letters are cut: every answer is whole, or says
//! that it is not.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use http::{Server, chat, completion, with};
use serde_json::{Value, json};
use support::{Checkpoints, FOR_K_QUANTS, SMALL, Shape, checkpoints};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn llama() -> Checkpoints {
    checkpoints("LlamaForCausalLM", SMALL, 11)
}

/// A greedy completion that does not end by itself.
fn endless(prompt: &str, tokens: usize) -> Value {
    with(completion(prompt, tokens), "logit_bias", json!({"257": -100}))
}

/// A completion that says what the expression matches.
fn saying(expression: &str, tokens: usize) -> Value {
    with(completion("Once", tokens), "grammar", json!({"type": "regex", "value": expression}))
}

/// Text and finish reason of each choice of a whole answer.
fn whole(answer: &Value) -> Vec<(String, String)> {
    let mut choices = answer["choices"].as_array().unwrap().clone();
    choices.sort_by_key(|choice| choice["index"].as_u64());
    let text =
        |choice: &Value| choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().into();
    choices.iter().map(|choice| (text(choice), choice["finish_reason"].as_str().unwrap().into())).collect()
}

/// The same of a streamed one.
fn streamed(events: &[Value]) -> Vec<(String, String)> {
    let mut told: Vec<(String, String)> = Vec::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().expect("choices")) {
        let index = choice["index"].as_u64().unwrap() as usize;
        told.resize_with(told.len().max(index + 1), Default::default);
        let (text, reason) = &mut told[index];
        assert!(reason.is_empty(), "a chunk after the last one: {choice}");
        text.push_str(choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    told
}

/// The only choice of an answer, which must be the same whole and streamed.
fn told(server: &Server, route: &str, body: &Value) -> (String, String) {
    let answer = whole(&server.json(route, body)).remove(0);
    assert_eq!(streamed(&server.stream(route, body)), std::slice::from_ref(&answer), "{body}");
    answer
}

fn expect(told: (String, String), text: &str, reason: &str) {
    assert_eq!((told.0.as_str(), told.1.as_str()), (text, reason));
}

#[test]
fn clients_that_give_up_fail_nobody_and_are_given_up() {
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 12);
    let server = Server::start(&checkpoints.dynamoe(), &["--prefix-cache", "0"]);
    let long = endless("Once upon a time", 300);
    let alone = server.json(TEXT, &long);
    let before = computed(&server);
    thread::scope(|scope| {
        let beside = scope.spawn(|| server.json(TEXT, &long));
        for round in 0..20 {
            let body = endless("The dog", 480).to_string();
            let mut connection = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
            let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                        Content-Length:";
            write!(connection, "{head} {}\r\n\r\n{body}", body.len()).unwrap();
            thread::sleep(Duration::from_millis(10 + 3 * round));
            connection.shutdown(Shutdown::Both).unwrap();
        }
        assert_eq!(whole(&beside.join().unwrap()), whole(&alone));
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut now = computed(&server);
    loop {
        thread::sleep(Duration::from_millis(300));
        let later = computed(&server);
        if later == now {
            break;
        }
        assert!(Instant::now() < deadline, "requests without clients still run");
        now = later;
    }
    // 20 × 480 tokens if they had run to their end
    assert!(now - before < 6000.0, "{} tokens were computed", now - before);
}

/// Tokens computed so far, in the first layer.
fn computed(server: &Server) -> f64 {
    let metrics = server.get("/metrics").text().unwrap();
    let counts = metrics.lines().filter(|line| line.starts_with("dynamoe_ffn_tokens_total{layer=\"0\""));
    counts.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[test]
fn an_answer_ends_with_the_context() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for (prompt, most, tokens) in [(505, 50, 7), (511, 50, 1), (3, 1000, 509), (505, 7, 7), (505, 6, 6)] {
        let body = endless(&"x".repeat(prompt), most);
        let answer = server.json(TEXT, &body);
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{prompt} and {most}");
        assert_eq!(told(&server, TEXT, &body).1, "length");
    }
    let mut unlimited = endless(&"x".repeat(500), 1);
    unlimited.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(told(&server, TEXT, &unlimited).1, "length");

    let refused = server.post(TEXT, &endless(&"x".repeat(512), 1));
    assert_eq!(refused.status(), 400);
    let refused = refused.text().unwrap();
    assert!(refused.contains("512 tokens") && refused.contains("511"), "{refused}");
}

#[test]
fn stop_strings_are_never_told() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let line = "there was a little girl";
    for (stop, text) in [
        (json!(["was"]), "there "),
        (json!("re was"), "the"),
        (json!([" little girl"]), "there was a"),
        (json!(["girls", "boy", "girl"]), "there was a little "),
        (json!(["a little", "was a"]), "there "),
        (json!(["t"]), ""),
    ] {
        expect(told(&server, TEXT, &with(saying(line, 40), "stop", stop.clone())), text, "stop");
        let body = with(chat("Once", 40), "grammar", json!({"type": "regex", "value": line}));
        expect(told(&server, CHAT, &with(body, "stop", stop)), text, "stop");
    }
    // what began like one is told when it is none, and at the end
    expect(told(&server, TEXT, &with(saying(line, 40), "stop", json!(["wax", "girls"]))), line, "stop");
    expect(told(&server, TEXT, &with(saying(line, 8), "stop", json!(["was"]))), "there wa", "length");
}

#[test]
fn letters_of_several_tokens_come_whole() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    expect(told(&server, TEXT, &saying("naïve 😀ok", 40)), "naïve 😀ok", "stop");
    expect(told(&server, TEXT, &saying("😀ok", 2)), "\u{fffd}", "length");
    expect(told(&server, TEXT, &saying("ok😀", 3)), "ok\u{fffd}", "length");
    expect(told(&server, TEXT, &with(saying("ok😀 🙂", 40), "stop", json!(["🙂"]))), "ok😀 ", "stop");
}

#[test]
fn leading_white_space_stays() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    expect(told(&server, TEXT, &saying(r"\n\t there", 40)), "\n\t there", "stop");
    let echo = server.json(TEXT, &with(saying(" there", 40), "echo", true));
    assert_eq!(whole(&echo)[0].0, "Once there");
}

/// A tokenizer that writes spaces as `▁`, and drops the one before a token that it decodes alone.
#[test]
fn log_probabilities_tell_tokens_with_their_spaces() {
    let shape = Shape { vocab_size: 260, ..SMALL };
    let checkpoints = checkpoints("LlamaForCausalLM", shape, 11);
    let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), json!(byte)));
    let words =
        [("<s>", 256), ("</s>", 257), ("▁there", 258), ("▁", 259)].map(|(word, id)| (word.into(), json!(id)));
    let vocab: serde_json::Map<String, Value> = bytes.chain(words).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<s>"), special(257, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    std::fs::write(format!("{}/tokenizer.json", checkpoints.dense()), tokenizer.to_string()).unwrap();
    let server = Server::start(&checkpoints.dense(), &[]);
    let there = json!({"258": 100});
    let body = with(with(completion("Once", 3), "logit_bias", there.clone()), "logprobs", 1);
    expect(told(&server, TEXT, &body), " there there there", "length");
    let told_tokens = &server.json(TEXT, &body)["choices"][0]["logprobs"]["tokens"];
    assert_eq!(*told_tokens, json!([" there", " there", " there"]));
    let body = with(with(with(chat("Once", 3), "logit_bias", there), "logprobs", true), "top_logprobs", 1);
    let answer = server.json(CHAT, &body);
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let events = server.stream(CHAT, &body);
    let of_events: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    assert!(tokens.len() == 3 && of_events.len() == 3, "{answer} {events:?}");
    for token in tokens.iter().chain(of_events) {
        assert_eq!(token["token"], " there", "{token}");
        assert_eq!(token["bytes"], json!(b" there"), "{token}");
    }
}

#[test]
fn streams_of_several_choices_keep_their_tails() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let mut lengths = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let body = with(with(saying(r"[ab]{3,40}\.", 60), "n", 4), "temperature", 1.0);
        let choices = streamed(&server.stream(TEXT, &body));
        assert_eq!(choices.len(), 4);
        for (text, reason) in choices {
            assert!(text.ends_with('.') && reason == "stop", "{text:?}, {reason}");
            lengths.insert(text.len());
        }
    }
    assert!(lengths.len() > 1, "all choices are equally long");
}

#[test]
fn a_tool_call_may_hold_any_letter() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let call = r#"<tool_call>\{"name": "weather", "arguments": \{"city": "Zürich, Łódź"\}\}</tool_call>"#;
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "tells the weather",
                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let body = with(chat("Once", 200), "grammar", json!({"type": "regex", "value": call}));
    let answer = server.json(CHAT, &with(body, "tools", json!([tool])));
    let function = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(function["name"], "weather", "{answer}");
    assert!(function["arguments"].as_str().unwrap().contains("Zürich, Łódź"), "{answer}");
}

/// Activations that F16 does not hold: the default type on a CPU has to.
#[test]
fn the_default_type_on_a_cpu_holds_what_bf16_holds() {
    let checkpoints = llama();
    let large = |name: &str, tensor: &candle_core::Tensor| {
        let factor = if name.ends_with("down_proj.weight") { 1e6 } else { 1.0 };
        (tensor * factor).unwrap()
    };
    let model = checkpoints.write_dense("large", large);
    let f32 = Server::start(&model, &[]);
    let auto = Server::run(&["--model", &model, "--cpu"]);
    let body = endless("Once upon a time", 20);
    assert_eq!(whole(&auto.json(TEXT, &body)), whole(&f32.json(TEXT, &body)));
    // and a type that does not hold the weights is refused before anything is served
    let arguments = ["--port", "0", "--model", &model, "--cpu", "--dtype", "f16"];
    let refused = Command::new(env!("CARGO_BIN_EXE_serve")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("down_proj.weight") && said.contains("F16"), "{said}");
}

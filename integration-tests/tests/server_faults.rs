//! `dynamoe-serve` over real HTTP where clients leave, contexts end and letters are cut: every answer is whole, or says
//! that it is not.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
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
    with(completion(prompt, tokens), "logit_bias", json!({"257": -1000}))
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
    assert_eq!(streamed(&server.stream(route, body)), [answer.clone()], "{body}");
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
    for (prompt, most, tokens) in [(505, 50, 8), (512, 50, 1), (3, 1000, 510), (505, 8, 8), (505, 7, 7)] {
        let body = endless(&"x".repeat(prompt), most);
        let answer = server.json(TEXT, &body);
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{prompt} and {most}");
        assert_eq!(told(&server, TEXT, &body).1, "length");
    }
    let mut unlimited = endless(&"x".repeat(500), 1);
    unlimited.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(told(&server, TEXT, &unlimited).1, "length");

    let refused = server.post(TEXT, &endless(&"x".repeat(513), 1));
    assert_eq!(refused.status(), 400);
    let refused = refused.text().unwrap();
    assert!(refused.contains("513 tokens") && refused.contains("512"), "{refused}");
}

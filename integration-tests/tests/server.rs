//! `dynamoe-serve` over real HTTP.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    io::Write,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use http::{Server, chat, completion, open_stream, read_until, with};
use serde_json::{Value, json};
use support::{Checkpoints, FOR_K_QUANTS, SMALL, checkpoints};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn llama() -> Checkpoints {
    checkpoints("LlamaForCausalLM", SMALL, 11)
}

fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {answer}"))
}

fn content_of(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content in {answer}"))
}

fn width_of(answer: &Value) -> f64 {
    answer["usage"]["mean_ffn_width"].as_f64().unwrap_or_else(|| panic!("no width in {answer}"))
}

/// The server must still answer.
fn is_well(server: &Server) {
    let answer = server.json(TEXT, &with(completion("still here?", 2), "sensitivity", 1.0));
    assert_eq!(width_of(&answer), 1.0);
}

#[test]
fn the_dial_of_a_request_shows_in_its_usage() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for (sensitivity, width) in [(0.0, 0.25), (1.0, 1.0)] {
        let answer = server.json(CHAT, &with(chat("Hello", 8), "sensitivity", sensitivity));
        assert_eq!(width_of(&answer), width);
        let answer = server.json(TEXT, &with(completion("Hello", 8), "sensitivity", sensitivity));
        assert_eq!(width_of(&answer), width);
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    }
    let middle = width_of(&server.json(TEXT, &with(completion("Hello", 8), "sensitivity", 0.5)));
    assert!(middle > 0.25 && middle < 1.0, "{middle}");
    assert_eq!(width_of(&server.json(TEXT, &with(completion("Hello", 8), "budget", 1.0))), 1.0);
}

#[test]
fn only_inference_models_health_metrics_and_the_dial_are_served() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for route in
        ["/v1/models/tune", "/v1/models/unload", "/re_isq", "/v1/system/doctor", "/v1/responses", "/x"]
    {
        let refused = server.post(route, &json!({"model_id": "x/y", "token_source": "path:/etc/passwd"}));
        assert_eq!(refused.status(), 404, "{route}");
        assert!(refused.headers().get("access-control-allow-origin").is_none(), "{route}");
        let told: Value = refused.json().unwrap();
        assert!(told["error"]["message"].as_str().unwrap().contains("/v1/completions"), "{told}");
    }
    assert_eq!(server.get("/v1/system/info").status(), 404);
    assert_eq!(server.get(TEXT).status(), 405);
    let models: Value = server.get("/v1/models").json().unwrap();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert!(names[0] == "default" && names.iter().all(|name| !name.contains('/')), "{names:?}");
    assert_eq!(server.get("/health").json::<Value>().unwrap(), json!({"status": "ok"}));
    is_well(&server);
    // where the model lies is told by no answer either
    let answer: Value = server.post("/v1/completions", &completion("Once", 2)).json().unwrap();
    assert!(!answer["model"].as_str().unwrap().contains('/'), "{answer}");
}

#[test]
fn other_sites_are_kept_out() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--allowed-host", "llm.example"]);
    let body = completion("x", 1).to_string();
    let send = |headers: &[(&str, &str)]| {
        let request = server.client.post(format!("{}{TEXT}", server.url)).body(body.clone());
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let answer = request.send().unwrap();
        assert!(
            answer.headers().keys().all(|name| !name.as_str().starts_with("access-control")),
            "{headers:?}"
        );
        answer.status().as_u16()
    };
    let json = ("content-type", "application/json");
    assert_eq!(send(&[json, ("origin", "https://evil.example")]), 200);
    assert_eq!(send(&[json, ("host", "llm.example")]), 200);
    assert_eq!(send(&[json, ("host", "evil.example")]), 403);
    assert_eq!(send(&[("content-type", "text/plain")]), 415);
    assert_eq!(send(&[]), 415);
    let preflight = server.client.request(reqwest::Method::OPTIONS, format!("{}{TEXT}", server.url));
    assert_eq!(preflight.header("origin", "https://evil.example").send().unwrap().status(), 405);
}

#[test]
fn full_width_says_what_the_dense_model_says() {
    let checkpoints = llama();
    let dense = Server::start(&checkpoints.dense(), &[]);
    let ours = Server::start(&checkpoints.dynamoe(), &["--sensitivity", "1"]);
    for prompt in ["Once upon a time", "fn main() {", "1, 2, 3"] {
        let (theirs, ours) = (dense.json(CHAT, &chat(prompt, 16)), ours.json(CHAT, &chat(prompt, 16)));
        assert_eq!(content_of(&theirs), content_of(&ours));
        assert_eq!(theirs["usage"]["mean_ffn_width"], Value::Null);
    }
    let refused = dense.post(CHAT, &with(chat("x", 1), "sensitivity", 0.5));
    assert_eq!(refused.status(), 400);
    assert!(refused.text().unwrap().contains("dense"));
    assert_eq!(dense.get("/v1/dynamoe").status(), 404);
}

#[test]
fn streaming_says_the_same() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for sensitivity in [0.0, 0.5, 1.0] {
        let body = with(chat("Tell me a story", 24), "sensitivity", sensitivity);
        let whole = server.json(CHAT, &body);
        let events = server.stream(CHAT, &body);
        let pieces: String =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(pieces, content_of(&whole));
        assert_eq!(width_of(events.last().unwrap()), width_of(&whole));

        let body = with(completion("Tell me a story", 24), "sensitivity", sensitivity);
        let whole = server.json(TEXT, &body);
        let events = server.stream(TEXT, &body);
        let pieces: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(pieces, text_of(&whole));
        assert_eq!(width_of(events.last().unwrap()), width_of(&whole));
    }
}

#[test]
fn concurrent_requests_with_mixed_dials_say_what_they_say_alone() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--max-seqs", "16"]);
    let requests: Vec<Value> = (0..16)
        .map(|i| {
            let sensitivity = [0.0, 0.4, 0.5, 0.6, 1.0][i % 5];
            with(completion(["Once upon", "In the end,"][i % 2], 24), "sensitivity", sensitivity)
        })
        .collect();
    let answer = |body: &Value| {
        let answer = server.json(TEXT, body);
        (text_of(&answer).to_owned(), width_of(&answer))
    };
    let alone: Vec<_> = requests.iter().map(answer).collect();
    let together: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = requests.iter().map(|body| scope.spawn(move || answer(body))).collect();
        running.into_iter().map(|request| request.join().unwrap()).collect()
    });
    for ((alone, together), body) in alone.iter().zip(&together).zip(&requests) {
        assert_eq!(alone.0, together.0, "{body}");
    }
}

/// A request that began from a cached prefix and is put off for shorter ones, in the middle of its answer, must go
/// on from its own keys and values.
#[test]
fn an_answer_from_a_cached_prefix_outlives_shorter_requests_beside_it() {
    let checkpoints = llama();
    // one prefix is kept: a request whose whole prompt is cached computes it anew
    let server = Server::start(&checkpoints.dynamoe(), &["--max-seqs", "4", "--prefix-cache", "1"]);
    let prefix = "It was late, and all the others slept";
    let long = completion(&format!("{prefix} but one"), 90);
    let alone = server.json(TEXT, &long);
    server.json(TEXT, &completion(prefix, 4));
    thread::scope(|scope| {
        let beside = scope.spawn(|| server.json(TEXT, &long));
        for words in 0..40 {
            let server = &server;
            scope.spawn(move || server.json(TEXT, &completion(&"on ".repeat(1 + words % 8), 3 + words % 5)));
            thread::sleep(Duration::from_millis(4));
        }
        assert_eq!(text_of(&beside.join().unwrap()), text_of(&alone));
    });
}

#[test]
fn the_default_dial_is_shown_and_set() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--sensitivity", "0.9"]);
    let shown: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!(shown["sensitivity"], 0.9);
    assert_eq!(shown["expert_widths"], json!([64, 128, 192, 256]));
    let set =
        |body: Value| server.client.put(format!("{}/v1/dynamoe", server.url)).json(&body).send().unwrap();
    assert_eq!(set(json!({"sensitivity": 0})).status(), 200);
    assert_eq!(width_of(&server.json(TEXT, &completion("Hello", 4))), 0.25);
    assert_eq!(set(json!({"budget": 0.75})).status(), 200);
    let shown: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!((&shown["budget"], &shown["sensitivity"]), (&json!(0.75), &Value::Null));
    assert_eq!(shown["layer_sensitivities"], json!([0.5, 0.6]));
    for wrong in [json!({}), json!({"sensitivity": 2}), json!({"budget": "x"}), json!([])] {
        assert_eq!(set(wrong.clone()).status(), 400, "{wrong}");
    }
    let shown: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!(shown["budget"], 0.75);
}

#[test]
fn a_token_guards_the_default_dial() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--token", "open sesame"]);
    let put = || server.client.put(format!("{}/v1/dynamoe", server.url)).json(&json!({"sensitivity": 0}));
    assert_eq!(put().send().unwrap().status(), 401);
    assert_eq!(put().bearer_auth("wrong").send().unwrap().status(), 401);
    assert_eq!(put().bearer_auth("open sesame").send().unwrap().status(), 200);
}

#[test]
fn metrics_count_tokens_by_layer_and_expert() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--prefix-cache", "0"]);
    server.json(TEXT, &with(completion("Hello", 8), "sensitivity", 0.0));
    assert_eq!(server.post(TEXT, &with(completion("x", 1), "budget", 7)).status(), 400);
    let metrics = server.get("/metrics").text().unwrap();
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    for layer in 0..2 {
        let labels = |expert| format!("{{layer=\"{layer}\",expert=\"{expert}\"");
        // five bytes, a beginning token perhaps, and all but the last of the tokens that were generated
        assert!(value(&format!("dynamoe_ffn_tokens_total{}", labels(0))) >= 5.0);
        assert_eq!(value(&format!("dynamoe_ffn_tokens_total{}", labels(3))), 0.0);
        assert!(value(&format!("dynamoe_router_seconds_total{{layer=\"{layer}\"")) > 0.0);
    }
    assert_eq!(value("dynamoe_mean_ffn_width"), 0.25);
    assert_eq!(value("dynamoe_default_sensitivity"), 0.5);
    assert_eq!(value("dynamoe_requests_total{route=\"/v1/completions\",status=\"200\"}"), 1.0);
    assert_eq!(value("dynamoe_requests_total{route=\"/v1/completions\",status=\"400\"}"), 1.0);
}

#[test]
fn bad_requests_get_a_message_and_do_no_harm() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--max-body-mib", "1"]);
    let bad = |body: Value, word: &str| {
        let response = server.post(CHAT, &body);
        let (status, text) = (response.status(), response.text().unwrap());
        assert!(status.is_client_error(), "{body}: {status} {text}");
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"));
        let message = json["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{body}: {message:?} does not say {word:?}");
    };
    for dial in ["sensitivity", "budget"] {
        for value in [json!(1.01), json!(-0.01), json!(1e300), json!("0.5"), json!(true), json!({})] {
            bad(with(chat("x", 1), dial, value), dial);
        }
    }
    bad(with(with(chat("x", 1), "sensitivity", 0.5), "budget", 0.5), "not both");
    bad(json!({"model": "default"}), "messages");
    bad(with(chat("x", 1), "model", "another"), "another");
    bad(with(chat("x", 1), "max_tokens", "many"), "many");

    let post = |body: &'static str| {
        let request = server.client.post(format!("{}{CHAT}", server.url));
        request.header("content-type", "application/json").body(body).send().unwrap()
    };
    for body in ["", "{", "[]", "null", "{\"messages\": 1e999}"] {
        assert_eq!(post(body).status(), 400, "{body:?}");
    }
    // the server does not read on, so the client may find the connection closed before it finds the answer
    let huge = chat(&"x".repeat(2 << 20), 1);
    let other_client = reqwest::blocking::Client::new();
    let huge = other_client.post(format!("{}{CHAT}", server.url)).json(&huge).send();
    assert!(huge.map_or_else(|error| error.is_request(), |response| response.status() == 413));
    bad(with(chat("x", 1), "no_such_field", 1), "no_such_field");
    is_well(&server);
}

#[test]
fn a_cancelled_stream_stops_computing() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for _ in 0..4 {
        let mut stream = open_stream(&server, 400);
        read_until(&mut stream, String::new(), "data: ");
    }
    let tokens = || {
        let metrics = server.get("/metrics").text().unwrap();
        let counts = metrics.lines().filter(|line| line.starts_with("dynamoe_ffn_tokens_total"));
        counts.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut before = tokens();
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = tokens();
        if now == before {
            break;
        }
        assert!(Instant::now() < deadline, "cancelled requests still run");
        before = now;
    }
    is_well(&server);
}

#[test]
fn clients_that_never_read_do_not_hold_up_others() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &["--max-seqs", "4"]);
    let silent: Vec<TcpStream> = (0..8).map(|_| open_stream(&server, 300)).collect();
    let half = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    (&half).write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{").unwrap();
    is_well(&server);
    drop((silent, half));
    is_well(&server);
}

#[test]
fn sigterm_lets_requests_finish() {
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 12); // slow enough to be caught in flight
    let mut server = Server::start(&checkpoints.dynamoe(), &["--drain-seconds", "60"]);
    let mut stream = open_stream(&server, 450);
    let begun = read_until(&mut stream, String::new(), "data: ");
    assert!(!begun.contains("[DONE]"));
    server.terminate();
    read_until(&mut stream, begun, "[DONE]");
    drop(stream);
    assert!(server.ended_well());
}

#[test]
fn sigterm_does_not_wait_forever() {
    let checkpoints = llama();
    let mut server = Server::start(&checkpoints.dynamoe(), &["--drain-seconds", "1"]);
    let half = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    (&half).write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{").unwrap();
    thread::sleep(Duration::from_millis(200));
    server.terminate();
    assert!(server.ended_well());
}

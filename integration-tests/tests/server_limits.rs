//! What keeps one client from taking everything.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use http::{Server, chat, completion, open_stream, read_until, with};
use serde_json::{Value, json};
use support::{Checkpoints, FOR_K_QUANTS, SMALL, checkpoints};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn slow() -> Checkpoints {
    checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 71)
}

fn address(server: &Server) -> &str {
    server.url.trim_start_matches("http://")
}

/// A connection on which `bytes` were sent.
fn connect(server: &Server, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address(server)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    stream
}

/// All that still comes on a connection until the server closes it.
fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn a_request_is_bounded_before_the_engine_sees_it() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 72);
    let server =
        Server::start(&checkpoints.dynamoe(), &["--max-answer-tokens", "1000", "--max-logits-mib", "0"]);
    let image = json!([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]);
    let chat_of =
        |content: Value| json!({"model": "default", "messages": [{"role": "user", "content": content}]});
    for (route, body, word) in [
        (TEXT, with(completion("the", 2), "n", 100_000), "n: expected at most 8"),
        (TEXT, with(completion("the", 2), "best_of", 100_000), "best_of: expected at most 8"),
        (TEXT, with(completion("the", 300), "n", 4), "max_tokens: expected at most 250"),
        (TEXT, with(completion("the", 2), "truncate_sequence", true), "truncate_sequence"),
        (TEXT, completion(&"a".repeat(2 << 20), 2), "prompt: expected at most"),
        (TEXT, with(with(completion("the", 1), "echo", true), "logprobs", 1), "--max-logits-mib"),
        (CHAT, chat(&"a".repeat(2 << 20), 2), "messages: expected at most"),
        (CHAT, chat_of(image), "image_url"),
    ] {
        let refused = server.post(route, &body);
        assert_eq!(refused.status(), 400, "{word}");
        let text = refused.text().unwrap();
        assert!(text.contains(word), "{text}");
    }
    // what says nothing of its length gets its share
    let mut open = with(chat("x", 1), "n", 4);
    open.as_object_mut().unwrap().remove("max_tokens");
    let answer = server.json(CHAT, &with(open, "logit_bias", json!({"257": -100})));
    assert_eq!(answer["usage"]["completion_tokens"], 1000);
}

#[test]
fn who_comes_when_enough_wait_is_told_to_come_again() {
    let checkpoints = slow();
    let server = Server::start(&checkpoints.dynamoe(), &["--max-seqs", "1", "--max-waiting", "1"]);
    let mut running = open_stream(&server, 400);
    let begun = read_until(&mut running, String::new(), "data: ");
    let waiting = open_stream(&server, 400);
    let deadline = Instant::now() + Duration::from_secs(20);
    let refused = loop {
        let answer = server.post(TEXT, &completion("x", 1));
        if answer.status() != 200 {
            break answer;
        }
        assert!(Instant::now() < deadline);
    };
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    let metrics = server.get("/metrics").text().unwrap();
    for line in ["mistralrs_sequences_running 1", "mistralrs_sequences_waiting 1"] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    assert_eq!(server.get("/health").status(), 200);
    assert!(!begun.contains("[DONE]"));
    // who leaves makes room
    drop((running, waiting));
    while server.post(TEXT, &completion("x", 1)).status() == 429 {
        assert!(Instant::now() < deadline, "seats are lost");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn half_heads_and_half_bodies_do_not_stay() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 73);
    let server = Server::start(&checkpoints.dynamoe(), &["--header-timeout", "1", "--body-timeout", "1"]);
    let begun = Instant::now();
    let mut silent = connect(&server, "");
    let mut half_head = connect(&server, "POST /v1/completions HTTP/1.1\r\nHost: loc");
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    let mut half_body = connect(&server, head);
    let mut idle = connect(&server, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(rest(&mut half_body).contains("408"));
    assert!(rest(&mut idle).contains("200 OK"));
    rest(&mut half_head);
    rest(&mut silent);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn connections_are_bounded_and_others_come_through_afterwards() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 74);
    let server = Server::start(&checkpoints.dynamoe(), &["--max-connections", "8", "--header-timeout", "2"]);
    let held: Vec<TcpStream> = (0..8).map(|_| connect(&server, "GET /hea")).collect();
    thread::sleep(Duration::from_millis(200));
    let mut turned_away = connect(&server, "");
    assert!(rest(&mut turned_away).starts_with("HTTP/1.1 503"));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(server.get("/health").status(), 200);
    drop(held);
}

#[test]
fn who_does_not_read_is_let_go() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 77);
    let server = Server::start(&checkpoints.dynamoe(), &["--write-timeout", "1"]);
    // answers too large for all buffers between us
    let body =
        json!({"model": "default", "prompt": "x".repeat(400), "max_tokens": 20, "echo": true, "logprobs": 20,
                      "n": 8, "temperature": 1})
        .to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:";
    let one = format!("{head} {}\r\n\r\n{body}", body.len());
    let mut silent = connect(&server, &one.repeat(12));
    let deadline = Instant::now() + Duration::from_secs(120);
    let answered = || {
        let metrics = server.get("/metrics").text().unwrap();
        let line = metrics.lines().find(|line| line.starts_with("http_requests_total{method=\"POST\""));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
    };
    // as many as the buffers hold, and then no more
    let mut before = 0;
    loop {
        thread::sleep(Duration::from_secs(4));
        let now = answered();
        if now == before && now > 0 {
            break;
        }
        before = now;
        assert!(Instant::now() < deadline);
    }
    assert!(before < 12, "all answers fitted into the buffers");
    // what was sent comes, and then the end
    silent.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut read = Vec::new();
    let ended = silent.read_to_end(&mut read);
    assert!(ended.is_ok() || ended.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    server.json(TEXT, &completion("x", 1));
}

#[test]
fn clients_that_leave_harm_nobody() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 75);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let long = with(completion("Once upon a time", 400), "logit_bias", json!({"257": -100}));
    let alone = server.json(TEXT, &long)["choices"].clone();
    let scored = with(with(completion("It was late", 1), "echo", true), "logprobs", 1);
    thread::scope(|scope| {
        let beside = scope.spawn(|| server.json(TEXT, &long));
        for n in 0..60 {
            let (server, scored) = (&server, &scored);
            scope.spawn(move || {
                let client = reqwest::blocking::Client::builder()
                    .timeout(Duration::from_millis(5 + n))
                    .build()
                    .unwrap();
                let body = if n % 3 == 0 { scored.clone() } else { completion("The dog", 100) };
                let _ = client.post(format!("{}{TEXT}", server.url)).json(&body).send();
                let _ = client.get(format!("{}/health", server.url)).send();
            });
        }
        assert_eq!(beside.join().unwrap()["choices"], alone);
    });
    assert_eq!(server.get("/health").status(), 200);
    let metrics = server.get("/metrics").text().unwrap();
    assert!(metrics.contains("dynamoe_requests_left_total"), "{metrics}");
}

/// Starts a server that has nobody to read what it writes.
fn start_unheard(arguments: &[&str]) -> std::process::Child {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    Command::new(env!("CARGO_BIN_EXE_serve"))
        .args(arguments)
        .env("RUST_LOG", "info")
        .stdout(Stdio::from(full()))
        .stderr(Stdio::from(full()))
        .spawn()
        .unwrap()
}

#[test]
fn a_full_disk_under_the_log_ends_nothing() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 76);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port = port.to_string();
    let mut process = start_unheard(&["--model", &checkpoints.dynamoe(), "--cpu", "--port", &port]);
    let client = reqwest::blocking::Client::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    let answered = loop {
        let answer = client.post(format!("http://127.0.0.1:{port}{TEXT}")).json(&completion("x", 2)).send();
        if answer.is_ok() || Instant::now() > deadline {
            break answer;
        }
        thread::sleep(Duration::from_millis(100));
    };
    let status = answered.map(|answer| answer.status().as_u16());
    let _ = process.kill();
    let _ = process.wait();
    assert_eq!(status.unwrap(), 200);
}

#[test]
fn a_second_signal_ends_at_once() {
    let checkpoints = slow();
    let mut server = Server::start(&checkpoints.dynamoe(), &["--drain-seconds", "600"]);
    let mut stream = open_stream(&server, 450);
    read_until(&mut stream, String::new(), "data: ");
    let begun = Instant::now();
    server.terminate();
    thread::sleep(Duration::from_millis(100));
    server.terminate();
    let well = server.ended_well();
    // it may have come to its end by itself
    assert!(!well || rest(&mut stream).contains("[DONE]"));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn while_it_loads_a_server_refuses_connections_and_a_signal_ends_it() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 78);
    // who reads this waits for ever
    let tokenizer = checkpoints.folder().join("dynamoe/tokenizer.json");
    std::fs::remove_file(&tokenizer).unwrap();
    assert!(Command::new("mkfifo").arg(&tokenizer).status().unwrap().success());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut process = Command::new(env!("CARGO_BIN_EXE_serve"))
        .args(["--model", &checkpoints.dynamoe(), "--cpu", "--port", &port])
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_secs(1));
    assert!(process.try_wait().unwrap().is_none(), "it does not wait for its tokenizer");
    assert!(TcpStream::connect(format!("127.0.0.1:{port}")).is_err(), "it takes connections");
    Command::new("kill").args(["-TERM", &process.id().to_string()]).status().unwrap();
    thread::sleep(Duration::from_secs(2));
    let ended = process.try_wait().unwrap();
    let _ = process.kill();
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
}

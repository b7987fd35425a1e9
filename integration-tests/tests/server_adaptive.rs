//! A default dial that follows the load.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use http::{Server, completion, with};
use serde_json::{Value, json};
use support::{FOR_K_QUANTS, SMALL, checkpoints};

const TEXT: &str = "/v1/completions";

fn budget(server: &Server) -> f64 {
    server.get("/v1/dynamoe").json::<Value>().unwrap()["budget"].as_f64().unwrap()
}

/// Waits until the default budget is this.
fn wait_for(server: &Server, expected: f64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while budget(server) != expected {
        assert!(Instant::now() < deadline, "the budget is {}, not {expected}", budget(server));
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_default_falls_under_load_and_returns_when_idle() {
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 91);
    // no step of four requests takes as little as the target
    let server = Server::start(&checkpoints.dynamoe(), &["--adaptive", "0.5..1", "--target-itl-ms", "1"]);
    assert_eq!(budget(&server), 1.0);
    let long = with(completion("Once upon a time", 400), "logit_bias", json!({"257": -100}));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    server.json(TEXT, &long);
                }
            });
        }
        wait_for(&server, 0.5);
        // a request of its own dial is left alone
        let own = server.json(TEXT, &with(completion("Once", 20), "sensitivity", 1.0));
        assert_eq!(own["usage"]["mean_ffn_width"], 1.0);
        let follows = server.json(TEXT, &completion("Once", 20));
        assert!(follows["usage"]["mean_ffn_width"].as_f64().unwrap() < 1.0, "{follows}");
        done.store(true, Relaxed);
    });
    wait_for(&server, 1.0);
    let idle = server.json(TEXT, &completion("Once", 2));
    assert_eq!(idle["usage"]["mean_ffn_width"], 1.0);
}

#[test]
fn a_running_answer_follows_too() {
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 92);
    let server = Server::start(&checkpoints.dynamoe(), &["--adaptive", "0.5..1", "--target-itl-ms", "1"]);
    let long = with(completion("Once upon a time", 400), "logit_bias", json!({"257": -100}));
    let widths = thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| server.stream(TEXT, &long))).collect();
        let mut widths = Vec::new();
        for events in all {
            let events = events.join().unwrap();
            let widths_of = events.iter().filter_map(|event| event["choices"][0]["ffn_width"].as_f64());
            widths.push(widths_of.collect::<Vec<f64>>());
        }
        widths
    });
    for widths in widths {
        assert_eq!(widths[0], 1.0, "{widths:?}");
        assert!(widths.last().is_some_and(|last| *last < 1.0), "{widths:?}");
    }
}

#[test]
fn it_is_told_and_cannot_be_set_by_hand() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 93);
    let server = Server::start(&checkpoints.dynamoe(), &["--adaptive", "0.5..0.75", "--target-itl-ms", "40"]);
    let told: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!(told["adaptive"], json!({"min": 0.5, "max": 0.75, "target_itl_ms": 40.0}));
    assert_eq!(told["budget"], 0.75);
    let put = server.client.put(format!("{}/v1/dynamoe", server.url)).json(&json!({"budget": 1}));
    let refused = put.send().unwrap();
    assert_eq!(refused.status(), 409);
    assert!(refused.text().unwrap().contains("--adaptive"));
    let metrics = server.get("/metrics").text().unwrap();
    for line in ["dynamoe_target_inter_token_latency_seconds 0.04", "dynamoe_default_budget 0.75"] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    let fixed = Server::start(&checkpoints.dynamoe(), &[]);
    assert_eq!(fixed.get("/v1/dynamoe").json::<Value>().unwrap()["adaptive"], Value::Null);
}

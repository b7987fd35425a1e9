//! Sixteen clients at once, with mixed dials, cancelled streams and bad requests: no error that is ours, no answer
//! that another client's request changed, and memory that stays where it was.
//!
//! Eight seconds; `DYNAMOE_LOAD_SECONDS=600` makes it ten minutes, and `TEST_SEED` repeats a run's requests:
//!
//! ```sh
//! DYNAMOE_LOAD_SECONDS=600 cargo test --release -p dynamoe-integration-tests --test load -- --nocapture
//! ```

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use http::{Server, completion, open_stream, read_until, with};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use support::{FOR_K_QUANTS, checkpoints};

const CLIENTS: u64 = 16;
const TEXT: &str = "/v1/completions";
/// What memory may grow by between the second and the last quarter of a run. A server that keeps what it should free
/// grows by the second: by keys and values of 0.5 MiB for each of some hundred requests, or by the 256 MiB that one
/// request for many choices can take.
const GROWTH: u64 = 32 << 20;
/// The same for a run of less than a minute, in which threads and caches are still filling.
const GROWTH_OF_A_SHORT_RUN: u64 = 96 << 20;

/// A request whose answer is known.
struct Probe {
    body: Value,
    text: String,
}

fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {answer}"))
}

fn probes(server: &Server) -> Vec<Probe> {
    let body = |dial| with(completion("Once upon a time there was", 6), "sensitivity", dial);
    [0.0, 0.45, 0.55, 1.0]
        .map(|dial| Probe { text: text_of(&server.json(TEXT, &body(dial))).to_owned(), body: body(dial) })
        .into()
}

/// How often each kind of request was made.
#[derive(Default)]
struct Counts {
    whole: AtomicU64,
    probes: AtomicU64,
    streamed: AtomicU64,
    cancelled: AtomicU64,
    refused: AtomicU64,
    dials: AtomicU64,
}

fn whole(server: &Server, rng: &mut ChaCha8Rng) {
    let prompt: String = (0..rng.random_range(1..200)).map(|_| rng.random_range('a'..='z')).collect();
    let dial = *[0.0, 0.3, 0.5, 0.7, 1.0].choose(rng).unwrap();
    let body = completion(&prompt, rng.random_range(1..32));
    let answer = match rng.random_range(0..3) {
        0 => server.json(TEXT, &body),
        1 => server.json(TEXT, &with(body, "budget", rng.random_range(0.5..=1.0))),
        _ => {
            let answer = server.json(TEXT, &with(body, "sensitivity", dial));
            let width = &answer["usage"]["mean_ffn_width"];
            assert!(dial > 0.0 || *width == 0.25, "{answer}");
            assert!(dial < 1.0 || *width == 1.0, "{answer}");
            answer
        }
    };
    let width = answer["usage"]["mean_ffn_width"].as_f64().unwrap();
    assert!((0.25..=1.0).contains(&width), "{answer}");
}

fn streamed(server: &Server, rng: &mut ChaCha8Rng) {
    let body =
        with(completion("Tell me", rng.random_range(1..24)), "sensitivity", rng.random_range(0.0..=1.0));
    let events = server.stream(TEXT, &body);
    assert!(events.last().unwrap()["usage"]["mean_ffn_width"].is_number(), "{events:?}");
}

/// Leaves in the middle of an answer, or before it.
fn cancelled(server: &Server, rng: &mut ChaCha8Rng) {
    let mut stream = open_stream(server, 200);
    if rng.random() {
        read_until(&mut stream, String::new(), "data: ");
    }
}

fn refused(server: &Server, rng: &mut ChaCha8Rng) {
    let plain = completion("x", 1);
    let body = match rng.random_range(0..6) {
        0 => with(plain, "sensitivity", 1.5),
        1 => with(plain, "budget", "half"),
        2 => with(with(plain, "sensitivity", 0.5), "budget", 0.5),
        3 => with(plain, "model", "another"),
        4 => with(plain, "max_tokens", "many"),
        _ => json!([1, 2, 3]),
    };
    let response = server.post(TEXT, &body);
    let (status, text) = (response.status(), response.text().unwrap());
    assert!(status.is_client_error(), "{body}: {status} {text}");
}

fn dials(server: &Server, rng: &mut ChaCha8Rng) {
    let body = json!({"sensitivity": rng.random_range(0.0..=1.0)});
    let put = server.client.put(format!("{}/v1/dynamoe", server.url)).json(&body).send().unwrap();
    assert_eq!(put.status(), 200);
    assert_eq!(server.get("/v1/dynamoe").status(), 200);
    assert_eq!(server.get("/metrics").status(), 200);
}

fn client(server: &Server, probes: &[Probe], counts: &Counts, seed: u64, deadline: Instant) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    while Instant::now() < deadline {
        let count = match rng.random_range(0..20) {
            0..8 => {
                whole(server, &mut rng);
                &counts.whole
            }
            8..11 => {
                let probe = probes.choose(&mut rng).unwrap();
                assert_eq!(text_of(&server.json(TEXT, &probe.body)), probe.text, "{}", probe.body);
                &counts.probes
            }
            11..14 => {
                streamed(server, &mut rng);
                &counts.streamed
            }
            14..17 => {
                cancelled(server, &mut rng);
                &counts.cancelled
            }
            17..19 => {
                refused(server, &mut rng);
                &counts.refused
            }
            _ => {
                dials(server, &mut rng);
                &counts.dials
            }
        };
        count.fetch_add(1, Relaxed);
    }
}

fn median(numbers: &[u64]) -> u64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[test]
fn many_clients_at_once() {
    let seconds = std::env::var("DYNAMOE_LOAD_SECONDS").map_or(8, |text| text.parse().unwrap());
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 41);
    let mut server = Server::start(&checkpoints.dynamoe(), &["--max-seqs", "8"]);
    let (probes, counts) = (probes(&server), Counts::default());
    let given = std::env::var("TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed: u64 = given.unwrap_or_else(rand::random);
    println!("TEST_SEED={seed}");
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut memory = Vec::new();
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (server, probes, counts) = (&server, &probes, &counts);
            scope.spawn(move || client(server, probes, counts, seed.wrapping_add(number), deadline));
        }
        while Instant::now() < deadline {
            memory.push(server.resident_bytes());
            thread::sleep(Duration::from_millis(250));
        }
    });
    let count = |count: &AtomicU64| count.load(Relaxed);
    println!(
        "{seconds} s, {CLIENTS} clients: {} whole answers, {} probes, {} streams, {} cancelled, {} refused, {} dials set",
        count(&counts.whole),
        count(&counts.probes),
        count(&counts.streamed),
        count(&counts.cancelled),
        count(&counts.refused),
        count(&counts.dials)
    );
    let quarter = memory.len() / 4;
    let (second, last) = (median(&memory[quarter..2 * quarter]), median(&memory[3 * quarter..]));
    println!(
        "resident memory, MiB: second quarter {}, last quarter {}, largest {}",
        second >> 20,
        last >> 20,
        memory.iter().max().unwrap() >> 20
    );
    let growth = if seconds >= 60 { GROWTH } else { GROWTH_OF_A_SHORT_RUN };
    assert!(last <= second + growth, "memory grew from {second} to {last} bytes");
    assert_eq!(text_of(&server.json(TEXT, &probes[3].body)), probes[3].text);
    server.terminate();
    assert!(server.ended_well());
}

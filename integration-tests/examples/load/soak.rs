//! Mixed load for a long time.

use std::{
    fs,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::client::Client;

#[derive(Debug, Args)]
pub struct Options {
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The server's process, whose memory and file descriptors are told
    #[arg(long)]
    pid: u32,
    #[arg(long, default_value_t = 32)]
    clients: usize,
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const PROMPTS: [&str; 6] = [
    "Once upon a time",
    "The dog ran to the",
    "It was late, and all the others slept",
    "Monday. The weather was",
    "é and ü are letters. So is",
    "1, 2, 3, 4,",
];

/// A greedy request and the answer that it got when the server was alone.
struct Known {
    body: Value,
    text: String,
    /// Of the prompt's tokens, if the request scores them.
    logprobs: Vec<f64>,
}

#[derive(Default)]
struct Counts {
    right: AtomicU64,
    wrong: AtomicU64,
    /// Answers that did not come, or not to their end.
    lost: AtomicU64,
    cancelled: AtomicU64,
    refused: AtomicU64,
    /// Requests that must be refused and were not.
    let_in: AtomicU64,
    busy: AtomicU64,
    complaints: Mutex<Vec<String>>,
}

impl Counts {
    fn complain(&self, count: &AtomicU64, what: String) {
        count.fetch_add(1, Relaxed);
        let mut complaints = self.complaints.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if complaints.len() < 20 {
            complaints.push(what);
        }
    }
}

pub fn soak(options: &Options) -> Result<()> {
    println!("seed {}", options.seed);
    let client = Client::new(&options.url)?;
    let known = known(&client)?;
    println!(
        "{} requests with known answers, {} clients, {} minutes",
        known.len(),
        options.clients,
        options.minutes
    );
    let (counts, done) = (Counts::default(), AtomicBool::new(false));
    let begun = Instant::now();
    println!("minute  resident MB  file descriptors  right  wrong  lost  cancelled  refused  let in  busy");
    thread::scope(|scope| {
        for number in 0..options.clients {
            let (known, counts, done) = (&known, &counts, &done);
            let rng = ChaCha8Rng::seed_from_u64(options.seed.wrapping_add(number as u64));
            scope.spawn(move || one_client(options, rng, known, counts, done));
        }
        for minute in 0..=options.minutes {
            let at = begun + Duration::from_secs(60 * minute);
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if let Err(error) = tell(minute, options.pid, &counts) {
                println!("the server is gone: {error:#}");
                break;
            }
        }
        done.store(true, Relaxed);
    });
    thread::sleep(Duration::from_secs(2));
    println!("afterwards, with no client:");
    tell(options.minutes, options.pid, &counts)?;
    for complaint in counts.complaints.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
        println!("{complaint}");
    }
    let bad = counts.wrong.load(Relaxed) + counts.lost.load(Relaxed) + counts.let_in.load(Relaxed);
    ensure!(bad == 0, "{bad} answers were wrong, lost, or given where they had to be refused");
    Ok(())
}

fn tell(minute: u64, pid: u32, counts: &Counts) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let resident: f64 = resident.trim().trim_end_matches("kB").trim().parse()?;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let all = [
        &counts.right,
        &counts.wrong,
        &counts.lost,
        &counts.cancelled,
        &counts.refused,
        &counts.let_in,
        &counts.busy,
    ];
    let all: Vec<String> = all.iter().map(|count| count.load(Relaxed).to_string()).collect();
    println!("{minute}  {:.1}  {descriptors}  {}", resident * 1024.0 / 1e6, all.join("  "));
    Ok(())
}

/// Dials in every form.
fn dialled(client: &Client) -> Result<Vec<Value>> {
    let mut dials = vec![
        json!({}),
        json!({"sensitivity": 0}),
        json!({"sensitivity": 0.4}),
        json!({"sensitivity": 1}),
        json!({"budget": 0.6}),
        json!({"sensitivity": {"prompt": 1, "answer": 0}}),
        json!({"budget": {"prompt": 0.5, "answer": 1}}),
    ];
    dials.extend(client.aliases()?.into_iter().map(|name| json!({"model": name})));
    Ok(dials)
}

fn known(client: &Client) -> Result<Vec<Known>> {
    let mut known = Vec::new();
    for dial in dialled(client)? {
        for (n, prompt) in PROMPTS.into_iter().enumerate() {
            let mut body =
                json!({"model": "default", "prompt": prompt, "temperature": 0, "max_tokens": 8 + 6 * n});
            for (key, value) in dial.as_object().context("a dial is an object")? {
                body[key] = value.clone();
            }
            if n % 3 == 2 {
                body["echo"] = true.into();
                body["logprobs"] = 1.into();
                body["max_tokens"] = 1.into();
            }
            let (status, answer) = client.post(TEXT, &body)?;
            ensure!(status == 200, "{body}: {status} {answer}");
            known.push(Known { body, text: text(&answer), logprobs: logprobs(&answer) });
        }
    }
    Ok(known)
}

fn text(answer: &Value) -> String {
    answer["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
}

fn logprobs(answer: &Value) -> Vec<f64> {
    let told = answer["choices"][0]["logprobs"]["token_logprobs"].as_array();
    told.into_iter().flatten().filter_map(Value::as_f64).collect()
}

/// Requests that are refused, each with its status.
fn hostile() -> Vec<(&'static str, Value, u16)> {
    let chat =
        |content: Value| json!({"model": "default", "messages": [{"role": "user", "content": content}]});
    vec![
        (TEXT, json!({"model": "default", "prompt": "the", "max_tokens": 2, "n": 100_000}), 400),
        (
            TEXT,
            json!({"model": "default", "prompt": "x".repeat(600), "max_tokens": 512, "truncate_sequence": true}),
            400,
        ),
        (TEXT, json!({"model": "default", "prompt": "a".repeat(2 << 20), "max_tokens": 1}), 400),
        (TEXT, json!({"model": "default", "prompt": "x", "sensitivity": 2}), 400),
        (TEXT, json!({"model": "default", "prompt": "x", "sensitivity": 1, "budget": 1}), 400),
        (TEXT, json!({"model": "default", "prompt": 7}), 400),
        (TEXT, json!({"model": "gpt-4", "prompt": "x"}), 404),
        (CHAT, chat(json!([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}])), 400),
        (CHAT, chat(json!([{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}])), 400),
        (CHAT, json!({"model": "default", "messages": []}), 400),
        (
            TEXT,
            json!({"model": "default", "prompt": "x", "grammar": {"type": "regex", "value": "a".repeat(1 << 20)}}),
            400,
        ),
        ("/v1/models/tune", json!({"model_id": "x/y", "token_source": "path:/etc/passwd"}), 404),
        ("/v1/models/unload", json!({"model_id": "default"}), 404),
        ("/re_isq", json!({"ggml_type": "Q4K"}), 404),
        ("/v1/system/doctor", json!({}), 404),
    ]
}

fn one_client(options: &Options, mut rng: ChaCha8Rng, known: &[Known], counts: &Counts, done: &AtomicBool) {
    let hostile = hostile();
    let client = match Client::new(&options.url) {
        Ok(client) => client,
        Err(error) => return counts.complain(&counts.lost, format!("no client: {error:#}")),
    };
    while !done.load(Relaxed) {
        let Some(one) = known.choose(&mut rng) else { return };
        match rng.random_range(0..10) {
            0..4 => match client.post(TEXT, &one.body) {
                Ok((200, answer)) => check(one, &text(&answer), Some(&logprobs(&answer)), counts),
                Ok((429, _)) => _ = counts.busy.fetch_add(1, Relaxed),
                Ok((status, answer)) => {
                    counts.complain(&counts.lost, format!("{}: {status} {answer}", one.body))
                }
                Err(error) => counts.complain(&counts.lost, format!("{}: {error:#}", one.body)),
            },
            4..7 => match client.stream(&one.body, usize::MAX) {
                Ok(streamed) => check(one, &streamed.text, None, counts),
                Err(error) if error.to_string().contains("429") => _ = counts.busy.fetch_add(1, Relaxed),
                Err(error) => counts.complain(&counts.lost, format!("{}: {error:#}", one.body)),
            },
            7..9 => {
                let _ = client.stream(&one.body, rng.random_range(1..6));
                counts.cancelled.fetch_add(1, Relaxed);
            }
            _ => {
                let Some((route, body, expected)) = hostile.choose(&mut rng) else { return };
                match client.post(route, body) {
                    Ok((status, _)) if status == *expected => _ = counts.refused.fetch_add(1, Relaxed),
                    Ok((status, answer)) => counts.complain(
                        &counts.let_in,
                        format!(
                            "{route} {:.200}: expected {expected}, found {status}: {answer}",
                            body.to_string()
                        ),
                    ),
                    Err(error) => counts.complain(&counts.lost, format!("{route}: {error:#}")),
                }
            }
        }
    }
}

fn check(known: &Known, text: &str, logprobs: Option<&[f64]>, counts: &Counts) {
    let same = |found: &[f64]| {
        found.len() == known.logprobs.len()
            && found.iter().zip(&known.logprobs).all(|(a, b)| (a - b).abs() < 1e-3)
    };
    if text == known.text && logprobs.is_none_or(same) {
        counts.right.fetch_add(1, Relaxed);
    } else {
        counts.complain(&counts.wrong, format!("{}: expected {:?}, found {text:?}", known.body, known.text));
    }
}

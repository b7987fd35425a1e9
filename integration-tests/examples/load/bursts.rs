//! Bursts of clients.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::client::Client;

#[derive(Debug, Args)]
pub struct Options {
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Clients in each burst
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,32,1")]
    clients: Vec<usize>,
    /// Length of a burst
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Tokens of an answer
    #[arg(long, default_value_t = 100)]
    tokens: usize,
}

/// What one client saw of answers in a burst.
#[derive(Default)]
struct Seen {
    gaps: Vec<Duration>,
    answers: usize,
    /// Mean width of each answer; none of a dense model.
    widths: Vec<f64>,
}

pub fn bursts(options: &Options) -> Result<()> {
    println!("clients  answers  p50 ms  p95 ms  mean width  tokens/s");
    for &clients in &options.clients {
        let end = Instant::now() + Duration::from_secs(options.seconds);
        let begun = Instant::now();
        let seen: Vec<Result<Seen>> = thread::scope(|scope| {
            let all: Vec<_> = (0..clients).map(|_| scope.spawn(move || one_client(options, end))).collect();
            all.into_iter().map(|client| client.join().unwrap_or_else(|_| Ok(Seen::default()))).collect()
        });
        let seconds = begun.elapsed().as_secs_f64();
        let mut all = Seen::default();
        for one in seen {
            let one = one?;
            all.gaps.extend(one.gaps);
            all.widths.extend(one.widths);
            all.answers += one.answers;
        }
        all.gaps.sort_unstable();
        let percentile = |percent: usize| {
            all.gaps
                .get(all.gaps.len().saturating_sub(1) * percent / 100)
                .map_or(f64::NAN, |gap| gap.as_secs_f64() * 1e3)
        };
        let answers = all.answers;
        println!(
            "{clients}  {answers}  {:.1}  {:.1}  {:.3}  {:.0}",
            percentile(50),
            percentile(95),
            all.widths.iter().sum::<f64>() / all.widths.len() as f64,
            (all.gaps.len() + answers) as f64 / seconds,
        );
    }
    Ok(())
}

/// Asks for one answer after the other until `end`.
fn one_client(options: &Options, end: Instant) -> Result<Seen> {
    let client = Client::new(&options.url)?;
    let body = json!({"model": "default", "prompt": "Once upon a time", "temperature": 0, "max_tokens": options.tokens});
    let mut seen = Seen::default();
    while Instant::now() < end {
        let streamed = client.stream(&body, usize::MAX)?;
        seen.gaps.extend(streamed.gaps);
        seen.answers += 1;
        seen.widths.extend(streamed.usage["mean_ffn_width"].as_f64());
    }
    Ok(seen)
}

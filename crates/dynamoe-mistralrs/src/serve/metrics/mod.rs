//! What the server counts and logs.

mod histogram;
mod latencies;
mod show;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicU64},
};

use crate::locks::lock;
use histogram::Histogram;
use latencies::Latencies;
pub(super) use show::show;
pub(super) use watch::Watch;

/// Everything since the server started.
pub(super) struct Metrics {
    /// Answers by method, route and status.
    answers: Mutex<BTreeMap<(String, String, u16), u64>>,
    first_token: Histogram,
    between_tokens: Histogram,
    /// What an adaptive dial follows.
    pub latencies: Latencies,
    prompt_tokens: AtomicU64,
    answer_tokens: AtomicU64,
    /// Completion requests that failed on their way, after their status was sent, and those whose client left.
    failed: AtomicU64,
    left: AtomicU64,
}

/// Upper bounds of the buckets, in seconds; mistral.rs has the same.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

impl Default for Metrics {
    fn default() -> Self {
        Self {
            answers: Mutex::default(),
            first_token: Histogram::new(FIRST_TOKEN),
            between_tokens: Histogram::new(BETWEEN_TOKENS),
            latencies: Latencies::default(),
            prompt_tokens: AtomicU64::new(0),
            answer_tokens: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, method: &str, route: &str, status: u16) {
        let mut answers = lock(&self.answers);
        *answers.entry((method.to_owned(), route.to_owned(), status)).or_default() += 1;
    }
}

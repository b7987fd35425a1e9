//! One completion request: its times and counts, and its line in the log.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::Metrics;
use crate::locks::lock;

/// The status of a request whose client left, in the log.
const LEFT: u16 = 499;

/// Watches one request; its end writes one line to the log, without any text of prompt or answer.
pub(in super::super) struct Watch {
    metrics: Arc<Metrics>,
    id: String,
    model: String,
    dial: String,
    begun: Instant,
    first: Mutex<Option<Duration>>,
    tokens: AtomicUsize,
    outcome: Mutex<Outcome>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Outcome {
    status: Option<u16>,
    prompt_tokens: usize,
    width: Option<f64>,
}

impl Watch {
    /// Of a request that begins now.
    pub fn new(metrics: &Arc<Metrics>, id: &str, model: &str, dial: String) -> Arc<Self> {
        Arc::new(Self {
            metrics: Arc::clone(metrics),
            id: id.to_owned(),
            model: model.to_owned(),
            dial,
            begun: Instant::now(),
            first: Mutex::new(None),
            tokens: AtomicUsize::new(0),
            outcome: Mutex::default(),
        })
    }

    /// The engine has chosen a token `at` this time, and the one before it of the same choice at `before`.
    pub fn token(&self, before: Option<Instant>, at: Instant) {
        self.tokens.fetch_add(1, Relaxed);
        if let Some(before) = before {
            let gap = at.saturating_duration_since(before);
            self.metrics.latencies.record(at, gap);
            return self.metrics.between_tokens.add(gap);
        }
        let mut told = lock(&self.first);
        if told.is_none() {
            let elapsed = at.saturating_duration_since(self.begun);
            *told = Some(elapsed);
            self.metrics.first_token.add(elapsed);
        }
    }

    /// The answer is told.
    pub fn used(&self, prompt_tokens: usize, answer_tokens: usize, width: Option<f64>) {
        self.metrics.prompt_tokens.fetch_add(prompt_tokens as u64, Relaxed);
        self.metrics.answer_tokens.fetch_add(answer_tokens as u64, Relaxed);
        let mut outcome = lock(&self.outcome);
        *outcome = Outcome { status: Some(200), prompt_tokens, width };
    }

    /// There is no answer, and the client is told so by this status.
    pub fn refused(&self, status: u16) {
        lock(&self.outcome).status = Some(status);
    }

    /// The answer broke off after its status was sent.
    pub fn failed(&self, status: u16) {
        self.metrics.failed.fetch_add(1, Relaxed);
        self.refused(status);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let outcome = *lock(&self.outcome);
        let first = *lock(&self.first);
        if outcome.status.is_none() {
            self.metrics.left.fetch_add(1, Relaxed);
        }
        tracing::info!(
            id = self.id,
            model = self.model,
            dial = self.dial,
            status = outcome.status.unwrap_or(LEFT),
            prompt_tokens = outcome.prompt_tokens,
            answer_tokens = self.tokens.load(Relaxed),
            mean_ffn_width = outcome.width,
            first_token_seconds = first.map(|first| first.as_secs_f64()),
            seconds = self.begun.elapsed().as_secs_f64(),
            "completion"
        );
    }
}

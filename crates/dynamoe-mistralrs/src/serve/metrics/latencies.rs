//! Inter-token latencies of the last moments, which an adaptive dial follows.

use std::{
    collections::VecDeque,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::locks::lock;

/// Latencies that are kept: more tokens in one period than any server decodes.
const KEPT: usize = 1 << 14;

/// Inter-token latencies of the last period.
#[derive(Debug, Default)]
pub(in super::super) struct Latencies(Mutex<VecDeque<(Instant, Duration)>>);

impl Latencies {
    /// A token came at this time, this long after the one before it.
    pub fn record(&self, at: Instant, latency: Duration) {
        let mut kept = lock(&self.0);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((at, latency));
    }

    /// The 95th percentile of those recorded in the `period` before `now`; none if there are none. Forgets older ones.
    pub fn p95(&self, now: Instant, period: Duration) -> Option<Duration> {
        let mut kept = lock(&self.0);
        kept.retain(|(at, _)| now.saturating_duration_since(*at) < period);
        let mut sorted: Vec<Duration> = kept.iter().map(|(_, latency)| *latency).collect();
        sorted.sort_unstable();
        sorted.get(sorted.len().saturating_sub(1) * 95 / 100).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_those_of_the_period() {
        let latencies = Latencies::default();
        assert_eq!(latencies.p95(Instant::now(), Duration::from_millis(500)), None);
        let now = Instant::now();
        (1..=100).for_each(|ms| latencies.record(now, Duration::from_millis(ms)));
        assert_eq!(latencies.p95(now, Duration::from_secs(60)), Some(Duration::from_millis(95)));
        assert_eq!(latencies.p95(now + Duration::from_secs(60), Duration::from_millis(500)), None);
        assert_eq!(latencies.p95(now, Duration::from_secs(60)), None, "old ones are forgotten");
    }
}

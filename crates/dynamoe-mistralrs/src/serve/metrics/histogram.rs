//! Counts of durations by size.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// How many durations were how long.
pub(super) struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: the last has none.
    counts: Vec<AtomicU64>,
    nanos: AtomicU64,
}

impl Histogram {
    /// With these upper bounds, in seconds.
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, nanos: AtomicU64::new(0) }
    }

    pub fn add(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.nanos.fetch_add(duration.as_nanos() as u64, Relaxed);
    }

    /// Its lines in Prometheus text.
    pub fn write(&self, text: &mut String, name: &str) {
        let mut sum = 0;
        for (n, count) in self.counts.iter().enumerate() {
            sum += count.load(Relaxed);
            let bound = self.bounds.get(n).map_or("+Inf".into(), f64::to_string);
            // writing to a String cannot fail
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let seconds = self.nanos.load(Relaxed) as f64 / 1e9;
        let _ = writeln!(text, "{name}_sum {seconds}\n{name}_count {sum}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_all_that_is_not_longer() {
        let histogram = Histogram::new(&[0.5, 1.0]);
        [500, 501, 3000].into_iter().for_each(|millis| histogram.add(Duration::from_millis(millis)));
        let mut text = String::new();
        histogram.write(&mut text, "x");
        let expected =
            "x_bucket{le=\"0.5\"} 1\nx_bucket{le=\"1\"} 2\nx_bucket{le=\"+Inf\"} 3\nx_sum 4.001\nx_count 3\n";
        assert_eq!(text, expected);
    }
}

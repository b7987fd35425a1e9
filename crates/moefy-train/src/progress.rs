//! Progress of long work, with its rate and the time left: a bar where there is a terminal, plain lines where there is
//! none. Both go to standard error.

use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::locks::lock;

/// Whether this process leaves it to another one to say what is done.
static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on, this process shows no progress: another one shows the same.
pub fn be_silent() {
    SILENT.store(true, Relaxed);
}

/// Whether another process says what is done.
pub fn is_silent() -> bool {
    SILENT.load(Relaxed)
}

/// Time between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Progress of one piece of long work. Tasks on several threads may add to it.
pub struct Progress {
    bar: ProgressBar,
    label: String,
    unit: &'static str,
    /// Units that were done before.
    first: u64,
    started: Instant,
    /// What the work says of itself, such as a loss.
    message: Mutex<String>,
    /// When the last plain line was written; none where there are no plain lines.
    plain: Option<Mutex<Instant>>,
}

impl Progress {
    /// `total` units (such as "tokens") of work named `label`, of which `done` were done earlier.
    pub fn new(label: &str, unit: &'static str, total: u64, done: u64) -> Self {
        let (silent, terminal) = (is_silent(), std::io::stderr().is_terminal());
        let bar = terminal && !silent;
        let target = if bar { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self::shown(label, unit, done..total, target, !terminal && !silent)
    }

    /// Progress that nobody sees.
    pub fn hidden() -> Self {
        Self::shown("", "", 0..0, ProgressDrawTarget::hidden(), false)
    }

    fn shown(
        label: &str,
        unit: &'static str,
        units: Range<u64>,
        target: ProgressDrawTarget,
        plain: bool,
    ) -> Self {
        let bar = ProgressBar::with_draw_target(Some(units.end), target);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_owned());
        bar.set_position(units.start);
        let started = Instant::now();
        Self {
            bar,
            label: label.to_owned(),
            unit,
            first: units.start,
            started,
            message: Mutex::default(),
            plain: plain.then(|| Mutex::new(started)),
        }
    }

    /// `units` more are done.
    pub fn add(&self, units: u64) {
        self.bar.inc(units);
        self.show();
    }

    /// `done` units are done in all; `message` holds a loss and the like.
    pub fn update(&self, done: u64, message: String) {
        *lock(&self.message) = message;
        self.bar.set_position(done);
        self.show();
    }

    /// Removes the bar, or writes a last line.
    pub fn finish(self) {
        let last = self.last_line();
        self.bar.finish_and_clear();
        if let Some(last) = last {
            self.write(&last);
        }
    }

    /// Where the work stands, for a reader that is no terminal. Finishing the bar moves it to its end, also where the work
    /// was stopped before.
    fn last_line(&self) -> Option<String> {
        let took = time(self.started.elapsed().as_secs_f64());
        self.plain.is_some().then(|| format!("{}, in {took}", self.status()))
    }

    /// Seconds that this many units take at the rate so far.
    pub fn seconds_for(&self, units: u64) -> f64 {
        units as f64 / self.rate().max(1e-9)
    }

    fn show(&self) {
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("{}, {} left", self.status(), self.left()));
        }
        let Some(plain) = &self.plain else { return };
        let mut last = lock(plain);
        if last.elapsed() >= PLAIN_EVERY {
            *last = Instant::now();
            self.write(&format!("{}, {} left", self.status(), self.left()));
        }
    }

    /// A plain line. A reader that has left must not end the work.
    fn write(&self, line: &str) {
        let _ = writeln!(std::io::stderr(), "{} {line}", self.label);
    }

    /// Units in a second since it began; 0 before anything is done.
    fn rate(&self) -> f64 {
        (self.bar.position() - self.first.min(self.bar.position())) as f64
            / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// `DONE/TOTAL UNIT, MESSAGE, RATE UNIT/s`
    fn status(&self) -> String {
        let (done, total, unit) = (self.bar.position(), self.bar.length().unwrap_or(0), self.unit);
        let message = lock(&self.message);
        let between = if message.is_empty() { "" } else { ", " };
        let rate = self.rate();
        let digits = if rate < 10.0 { 2 } else { 0 };
        format!("{done}/{total} {unit}{between}{message}, {rate:.digits$} {unit}/s")
    }

    fn left(&self) -> String {
        let left = self.bar.length().unwrap_or(0).saturating_sub(self.bar.position());
        let rate = self.rate();
        if rate > 0.0 { time(left as f64 / rate) } else { "?".into() }
    }
}

/// Seconds as people say them.
pub fn time(seconds: f64) -> String {
    match seconds.round() as u64 {
        s @ ..120 => format!("{s} s"),
        s @ ..7200 => format!("{} min", s / 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        let all = [0.4, 119.0, 120.0, 7199.0, 7261.0, 1e6].map(time);
        assert_eq!(all, ["0 s", "119 s", "2 min", "119 min", "2 h 1 min", "277 h 46 min"]);
    }

    #[test]
    fn what_was_stopped_is_told_as_far_as_it_came() {
        let progress = Progress::shown("", "tokens", 0..1000, ProgressDrawTarget::hidden(), true);
        progress.add(300);
        assert!(progress.last_line().unwrap().starts_with("300/1000 tokens"));
        let seen = Progress::shown("", "tokens", 0..1000, ProgressDrawTarget::hidden(), false);
        assert_eq!(seen.last_line(), None);
    }

    #[test]
    fn a_rate_counts_what_was_done_since_the_start() {
        let mut progress = Progress::shown("", "tokens", 400..1000, ProgressDrawTarget::hidden(), false);
        progress.started -= Duration::from_secs(10);
        assert_eq!(progress.left(), "?");
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| progress.add(50))));
        });
        assert!((progress.rate() - 20.0).abs() < 0.1, "{}", progress.rate());
        assert_eq!(progress.left(), "20 s");
        progress.update(700, "loss 3".into());
        assert_eq!(progress.status(), "700/1000 tokens, loss 3, 30 tokens/s");
    }
}

//! A progress bar where there is a terminal, plain lines where there is none. Both go to standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Seconds between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Progress of one piece of long work.
pub struct Progress {
    bar: ProgressBar,
    label: String,
    plain: Option<Instant>,
    started: Instant,
    first: u64,
}

impl Progress {
    /// `total` units of work named `label`, of which `done` were done earlier.
    pub fn new(label: &str, total: u64, done: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(total),
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta} left") {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_owned());
        bar.set_position(done);
        bar.reset_eta();
        let plain = (!terminal).then(Instant::now);
        Self { bar, label: label.to_owned(), plain, started: Instant::now(), first: done }
    }

    /// `done` units are done in all; `message` holds rate, loss and the like.
    pub fn update(&mut self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        let total = self.bar.length().unwrap_or(done);
        if let Some(last) = self.plain.filter(|last| last.elapsed() >= PLAIN_EVERY || done == total) {
            let rate = (done - self.first) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
            let left = ((total - done.min(total)) as f64 / rate.max(1e-9)).round();
            // a reader that has left must not end the training
            let _ = writeln!(std::io::stderr(), "{} {done}/{total} {message} {left:.0} s left", self.label);
            self.plain = Some(last + last.elapsed());
        }
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

//! Asking a training to stop, and knowing whether there is one.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// Shared by whoever asks to stop and the trainings that are asked.
#[derive(Debug, Default)]
pub struct Stop {
    asked: AtomicBool,
    trainings: AtomicUsize,
}

impl Stop {
    /// Asks trainings to save and stop. Whether they were asked before.
    pub fn ask(&self) -> bool {
        self.asked.swap(true, Relaxed)
    }

    /// Whether somebody has asked.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Relaxed)
    }

    /// Whether a training is running, so that there is something to save.
    pub fn is_training(&self) -> bool {
        self.trainings.load(Relaxed) > 0
    }

    /// Counts a training for as long as the answer lives.
    pub(super) fn training(&self) -> Training<'_> {
        self.trainings.fetch_add(1, Relaxed);
        Training(self)
    }
}

/// A training that is running.
pub(super) struct Training<'a>(&'a Stop);

impl Drop for Training<'_> {
    fn drop(&mut self) {
        self.0.trainings.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_is_known_while_it_lives() {
        let stop = Stop::default();
        assert!(!stop.is_training());
        let training = stop.training();
        assert!(stop.is_training() && !stop.is_asked());
        assert!(!stop.ask() && stop.ask() && stop.is_asked());
        drop(training);
        assert!(!stop.is_training());
    }
}

//! One parallel region of several phases: threads take items as they come, and a phase begins when the one
//! before is done.
//!
//! The calling thread works too, so a region that wakes no other thread in time still ends.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::pool;

/// The least work for each thread that is worth waking one for, in the units of [`Phase::cost`].
const WORTH_A_THREAD: usize = 1 << 16;

/// Items that may run at the same time.
pub(crate) struct Phase<'a> {
    pub items: usize,
    /// What all items cost together: bytes of weights times tokens, roughly.
    pub cost: usize,
    pub run: &'a (dyn Fn(usize) + Sync),
}

struct Progress {
    next: AtomicUsize,
    done: AtomicUsize,
}

/// Counts an item as done, also when it panics: other threads wait for it.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// Runs all phases.
pub(crate) fn run(phases: &[Phase]) {
    let cost: usize = phases.iter().map(|p| p.cost).sum();
    let items = phases.iter().map(|p| p.items).max().unwrap_or(0);
    let threads = rayon::current_num_threads().min(cost / WORTH_A_THREAD).min(items);
    if threads <= 1 {
        phases.iter().for_each(|phase| (0..phase.items).for_each(phase.run));
        return;
    }
    let progress: Vec<Progress> =
        phases.iter().map(|_| Progress { next: AtomicUsize::new(0), done: AtomicUsize::new(0) }).collect();
    let work = || {
        for (phase, progress) in phases.iter().zip(&progress) {
            loop {
                let item = progress.next.fetch_add(1, Ordering::Relaxed);
                if item >= phase.items {
                    break;
                }
                let _done = Done(&progress.done);
                (phase.run)(item);
            }
            pool::spin_until(|| progress.done.load(Ordering::Acquire) >= phase.items);
        }
    };
    pool::run(threads, &work);
}

//! Threads that help a calling thread, and stay awake for a moment after.
//!
//! Waking a sleeping thread takes microseconds, and so does the FFN of a small model; a decoder calls the next
//! layer soon after: so helpers look for the next call for a while, yielding to any thread that wants to run, and
//! only then sleep. A caller never waits for a helper that has not begun.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long helpers look for work before they sleep.
const AWAKE: Duration = Duration::from_micros(300);

/// Work that any number of threads may run at the same time.
type Job<'a> = &'a (dyn Fn() + Sync);

/// The job that helpers may join.
struct Posted {
    job: *const (dyn Fn() + Sync),
    /// Helpers that may still join.
    seats: usize,
}

// SAFETY: the pointer is followed under the protocol of `Pool::run` only.
unsafe impl Send for Posted {}

#[derive(Default)]
struct Pool {
    /// Held by the caller whose job it is; the number of helpers that exist.
    caller: Mutex<usize>,
    /// Changes with every job.
    posts: AtomicUsize,
    posted: Mutex<Option<Posted>>,
    /// Helpers that run the job.
    active: AtomicUsize,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    wake: Condvar,
    asleep: Mutex<()>,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(Pool::default)
}

/// Locks `mutex`, also after a panic elsewhere: what this crate keeps in a mutex is replaced as a whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `job` on this thread and on up to `threads - 1` helpers, and returns when all of them are done. If the
/// helpers are busy with another caller's job, this thread runs it alone: jobs must not count on helpers.
pub(super) fn run(threads: usize, job: Job) {
    let pool = pool();
    let mut helpers = match pool.caller.try_lock() {
        Ok(helpers) if threads > 1 => helpers,
        Err(TryLockError::Poisoned(poisoned)) if threads > 1 => poisoned.into_inner(),
        _ => return job(),
    };
    while *helpers < threads - 1 {
        let name = format!("dynamoe-cpu-{}", *helpers);
        if std::thread::Builder::new().name(name).spawn(move || pool.help()).is_err() {
            break;
        }
        *helpers += 1;
    }
    pool.run(threads - 1, job);
}

/// Takes the job back when its caller is done with it, also by a panic.
struct Recall<'a>(&'a Pool);

impl Drop for Recall<'_> {
    fn drop(&mut self) {
        *lock(&self.0.posted) = None;
        spin_until(|| self.0.active.load(SeqCst) == 0);
    }
}

impl Pool {
    /// The job is posted while this runs, and no longer: helpers count themselves as active under the lock of
    /// `posted`, and this function takes the post back under the same lock, then waits for them.
    fn run(&self, seats: usize, job: Job) {
        // SAFETY: only the lifetime changes, and `Recall` ends all use of the pointer before this returns
        let job_pointer: *const (dyn Fn() + Sync) =
            unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        self.panicked.store(false, SeqCst);
        *lock(&self.posted) = Some(Posted { job: job_pointer, seats });
        self.posts.fetch_add(1, SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            drop(lock(&self.asleep));
            self.wake.notify_all();
        }
        let recall = Recall(self);
        job();
        drop(recall);
        if self.panicked.swap(false, SeqCst) {
            panic!("a thread panicked in a parallel region");
        }
    }

    fn help(&self) {
        let mut seen = 0;
        loop {
            seen = self.next_post(seen);
            let job = {
                let mut posted = lock(&self.posted);
                match posted.as_mut() {
                    Some(post) if post.seats > 0 => {
                        post.seats -= 1;
                        self.active.fetch_add(1, SeqCst);
                        post.job
                    }
                    _ => continue,
                }
            };
            // SAFETY: this helper is active, so the job's caller waits for it
            let job = unsafe { &*job };
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                self.panicked.store(true, SeqCst);
            }
            self.active.fetch_sub(1, SeqCst);
        }
    }

    /// Waits for another post than number `seen`.
    fn next_post(&self, seen: usize) -> usize {
        let start = Instant::now();
        let mut spins = 0u32;
        loop {
            let posts = self.posts.load(SeqCst);
            if posts != seen {
                return posts;
            }
            spins += 1;
            if !spins.is_multiple_of(64) {
                std::hint::spin_loop();
            } else if start.elapsed() < AWAKE {
                std::thread::yield_now();
            } else {
                let asleep = lock(&self.asleep);
                self.sleepers.fetch_add(1, SeqCst);
                // a post that came before this helper counted as asleep would wake nobody
                if self.posts.load(SeqCst) == seen {
                    drop(self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner));
                }
                self.sleepers.fetch_sub(1, SeqCst);
            }
        }
    }
}

/// Spins a while, then lets others run.
pub(super) fn spin_until(done: impl Fn() -> bool) {
    let mut spins = 0u32;
    while !done() {
        spins += 1;
        if !spins.is_multiple_of(1024) {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_items_run_whoever_helps() {
        let rounds = if cfg!(miri) { 3 } else { 2_000 };
        std::thread::scope(|scope| {
            for threads in [1, 2, 3] {
                scope.spawn(move || {
                    for round in 0..rounds {
                        let (next, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
                        run(threads, &|| {
                            loop {
                                let item = next.fetch_add(1, SeqCst);
                                if item >= 20 {
                                    break;
                                }
                                sum.fetch_add(item, SeqCst);
                            }
                        });
                        assert_eq!(sum.into_inner(), 190);
                        if round == rounds / 2 {
                            // long enough for helpers to sleep
                            std::thread::sleep(2 * AWAKE);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        for _ in 0..3 {
            let caught = catch_unwind(|| run(2, &|| panic!("expected by the test")));
            assert!(caught.is_err());
            let count = AtomicUsize::new(0);
            run(2, &|| _ = count.fetch_add(1, SeqCst));
            assert!(count.into_inner() >= 1);
        }
    }
}

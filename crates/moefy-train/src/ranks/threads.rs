//! Ranks that are threads of one process, for tests.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::Ranks;
use crate::locks::lock;

/// How long the others may take until a rank gives up: one that panicked never comes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the ranks have in common.
struct Room {
    /// How often ranks have come to a barrier.
    arrivals: Mutex<usize>,
    arrived: Condvar,
    /// What each rank has put down for the others.
    table: Mutex<Vec<Vec<f64>>>,
}

/// One of the threads.
struct Thread<'a> {
    rank: usize,
    size: usize,
    room: &'a Room,
}

/// Runs `body` on `size` ranks at the same time; what each returned, in the order of ranks.
pub fn run<T: Send>(size: usize, body: impl Fn(&dyn Ranks) -> T + Sync) -> Vec<T> {
    let table = Mutex::new(vec![Vec::new(); size]);
    let room = Room { arrivals: Mutex::default(), arrived: Condvar::new(), table };
    std::thread::scope(|scope| {
        let (room, body) = (&room, &body);
        let start = |rank| scope.spawn(move || body(&Thread { rank, size, room }));
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}

impl Thread<'_> {
    /// What all ranks put down. `f32` fits into `f64`.
    fn put_down(&self, numbers: Vec<f64>) -> Vec<Vec<f64>> {
        lock(&self.room.table)[self.rank] = numbers;
        self.barrier();
        let all = lock(&self.room.table).clone();
        self.barrier();
        all
    }
}

impl Ranks for Thread<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn on_this_machine(&self) -> usize {
        self.size
    }

    fn barrier(&self) {
        let mut arrivals = lock(&self.room.arrivals);
        *arrivals += 1;
        let all = arrivals.next_multiple_of(self.size);
        self.room.arrived.notify_all();
        let waited = self.room.arrived.wait_timeout_while(arrivals, PATIENCE, |arrivals| *arrivals < all);
        assert!(!waited.expect("no rank panics here").1.timed_out(), "a rank is missing");
    }

    fn all_gather(&self, numbers: &[f64]) -> Vec<Vec<f64>> {
        self.put_down(numbers.to_vec())
    }

    fn gather(&self, numbers: Vec<f32>) -> Vec<f32> {
        let all = self.put_down(wide(&numbers)).concat();
        if self.rank == 0 { narrow(&all) } else { Vec::new() }
    }

    fn share(&self, block: &[f32], blocks: &mut [f32]) {
        blocks.copy_from_slice(&narrow(&self.put_down(wide(block)).concat()));
    }

    fn exchange(&self, blocks: &[f32], received: &mut [f32]) {
        let len = blocks.len() / self.size;
        let all = self.put_down(wide(blocks));
        let own = all.iter().flat_map(|blocks| &blocks[self.rank * len..][..len]);
        received.copy_from_slice(&narrow(&own.copied().collect::<Vec<_>>()));
    }

    fn end(&self, status: i32) -> ! {
        panic!("all ranks were to end, with status {status}")
    }
}

fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&number| f64::from(number)).collect()
}

fn narrow(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|&number| number as f32).collect()
}

//! Several processes that work on one task: each is a rank, from 0 on.
//!
//! All ranks run the same program on the same input and come to the same results. Work that is divided is put together with
//! the calls of [`Ranks`], which all ranks make in the same order. Only the first rank writes. [`Alone`] is one process,
//! whose calls cost nothing. With the feature `mpi`, [`join`] finds the processes that `mpirun` started.

mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
pub mod threads;

pub use launch::launched_rank;

use anyhow::Result;

/// The ranks, as one of them sees them. A rank that fails has to end all others: they wait for it.
pub trait Ranks {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// How many of them are on this machine.
    fn on_this_machine(&self) -> usize;

    /// Waits until all ranks are here, perhaps for long.
    fn barrier(&self);

    /// The numbers of every rank, in the order of ranks.
    fn all_gather(&self, numbers: &[f64]) -> Vec<Vec<f64>>;

    /// The numbers of all ranks, one after the other, on the first rank; nothing on the others.
    fn gather(&self, numbers: Vec<f32>) -> Vec<f32>;

    /// Copies the `block` of each rank, all of one length, to the others: `blocks` is filled in the order of ranks.
    fn share(&self, block: &[f32], blocks: &mut [f32]);

    /// Hands block `k` of `blocks`, all of one length, to rank `k`: `received` is filled in the order of ranks.
    fn exchange(&self, blocks: &[f32], received: &mut [f32]);

    /// Ends all ranks at once, with this exit status where the launcher passes it on.
    fn end(&self, status: i32) -> !;
}

/// Joins the other processes that a launcher such as `mpirun` started; [`Alone`] where it started no others.
///
/// # Errors
/// There are others, and this program was built without MPI.
pub fn join() -> Result<Box<dyn Ranks>> {
    if launched_rank().is_none() {
        return Ok(Box::new(Alone));
    }
    #[cfg(feature = "mpi")]
    return Ok(Box::new(mpi::Mpi::join()?));
    #[cfg(not(feature = "mpi"))]
    anyhow::bail!(
        "started as one of several processes, as by mpirun, but this program was built for one: build it with \
         `--features mpi`, or start it by itself"
    )
}

impl dyn Ranks + '_ {
    /// Whether this is the first rank, the one that writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether any rank says so.
    pub fn any(&self, yes: bool) -> bool {
        self.all_gather(&[f64::from(u8::from(yes))]).iter().any(|said| said[0] > 0.0)
    }

    /// What the first rank says. All ranks have to take the same way, whatever they see of a common disk.
    pub fn as_first(&self, yes: bool) -> bool {
        self.all_gather(&[f64::from(u8::from(yes))])[0][0] > 0.0
    }

    /// Does `work` that writes, on the first rank. The others wait for it.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn first(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.is_first() {
            work()?;
        }
        self.barrier();
        Ok(())
    }

    /// Does `work` on the first rank, and then on all others: what the first one leaves on disk, they find there.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn first_then_others<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_first() {
            let done = work()?;
            self.barrier();
            return Ok(done);
        }
        self.barrier();
        work()
    }

    /// The ones of `count` pieces of work that are this rank's.
    pub fn own(&self, count: usize) -> Vec<usize> {
        (self.rank()..count).step_by(self.size()).collect()
    }

    /// The numbers of `count` pieces of work in their order: each rank gives those of its `own`.
    pub fn all_gather_own(&self, count: usize, own: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let lengths: Vec<f64> = own.iter().map(|numbers| numbers.len() as f64).collect();
        let lengths = self.all_gather(&lengths);
        let numbers = self.all_gather(&own.concat());
        let mut places = vec![0; self.size()];
        let mut next = |piece: usize| {
            let (rank, turn) = (piece % self.size(), piece / self.size());
            let start = places[rank];
            places[rank] += lengths[rank][turn] as usize;
            numbers[rank][start..places[rank]].to_vec()
        };
        (0..count).map(&mut next).collect()
    }
}

/// The only process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn on_this_machine(&self) -> usize {
        1
    }

    fn barrier(&self) {}

    fn all_gather(&self, numbers: &[f64]) -> Vec<Vec<f64>> {
        vec![numbers.to_vec()]
    }

    fn gather(&self, numbers: Vec<f32>) -> Vec<f32> {
        numbers
    }

    fn share(&self, block: &[f32], blocks: &mut [f32]) {
        blocks.copy_from_slice(block);
    }

    fn exchange(&self, blocks: &[f32], received: &mut [f32]) {
        received.copy_from_slice(blocks);
    }

    fn end(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}

#[cfg(test)]
mod tests {
    use super::threads::run;

    #[test]
    fn numbers_come_in_the_order_of_ranks() {
        for size in 1..=4 {
            run(size, |ranks| {
                let rank = ranks.rank();
                let all = ranks.all_gather(&vec![rank as f64; rank]);
                assert_eq!(all, (0..size).map(|rank| vec![rank as f64; rank]).collect::<Vec<_>>());
                let first = ranks.gather(vec![rank as f32; rank]);
                let expected: Vec<f32> = (0..size).flat_map(|rank| vec![rank as f32; rank]).collect();
                assert_eq!(first, if rank == 0 { expected } else { Vec::new() });
                let mut blocks = vec![0.0; 2 * size];
                ranks.share(&[rank as f32, 0.5], &mut blocks);
                assert_eq!(blocks, (0..size).flat_map(|rank| [rank as f32, 0.5]).collect::<Vec<_>>());
                let mut received = vec![0.0; size];
                let blocks: Vec<f32> = (0..size).map(|to| (10 * rank + to) as f32).collect();
                ranks.exchange(&blocks, &mut received);
                assert_eq!(received, (0..size).map(|from| (10 * from + rank) as f32).collect::<Vec<_>>());
                assert!(ranks.any(rank + 1 == size) && !ranks.any(false));
            });
        }
    }

    #[test]
    fn divided_work_comes_back_in_its_order() {
        for (size, count) in [(1, 3), (2, 5), (3, 2), (3, 0), (4, 9)] {
            run(size, |ranks| {
                let own: Vec<Vec<f64>> =
                    ranks.own(count).iter().map(|&piece| vec![piece as f64; piece % 3]).collect();
                let all = ranks.all_gather_own(count, &own);
                assert_eq!(all, (0..count).map(|piece| vec![piece as f64; piece % 3]).collect::<Vec<_>>());
            });
        }
    }

    #[test]
    fn the_others_work_after_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("made");
        run(3, |ranks| {
            let found = ranks.first_then_others(|| {
                let found = file.exists();
                std::fs::write(&file, "made")?;
                Ok(found)
            });
            assert_eq!(found.unwrap(), !ranks.is_first());
        });
    }
}

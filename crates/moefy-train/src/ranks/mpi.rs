//! The processes that an MPI launcher started.

use std::time::Duration;

use anyhow::{Context, Result};
use mpi::Threading;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use super::Ranks;

/// Time between two looks at a barrier: others may work for long before they reach it.
const PATIENCE: Duration = Duration::from_millis(2);

/// All processes of `mpirun`. Its calls come from the thread that joined. An error of MPI ends all processes.
pub struct Mpi {
    world: SimpleCommunicator,
    neighbours: usize,
    /// Leaves MPI when it is dropped.
    _universe: Universe,
}

impl Mpi {
    /// Joins the other processes.
    ///
    /// # Errors
    /// MPI was joined before.
    pub fn join() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)
            .context("this process has joined the others already")?;
        let world = universe.world();
        let neighbours = world.split_shared(world.rank()).size() as usize;
        Ok(Self { world, neighbours, _universe: universe })
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn on_this_machine(&self) -> usize {
        self.neighbours
    }

    fn barrier(&self) {
        // a wait inside MPI would keep a processor busy
        let mut request = self.world.immediate_barrier();
        while let Err(waiting) = request.test() {
            request = waiting;
            std::thread::sleep(PATIENCE);
        }
    }

    fn all_gather(&self, numbers: &[f64]) -> Vec<Vec<f64>> {
        let mut counts = vec![0i32; self.size()];
        self.world.all_gather_into(&(numbers.len() as i32), &mut counts[..]);
        let starts = starts(&counts);
        let mut all = vec![0.0; counts.iter().sum::<i32>() as usize];
        self.world.all_gather_varcount_into(
            numbers,
            &mut PartitionMut::new(&mut all[..], &counts[..], &starts[..]),
        );
        let part = |(&start, &count): (&i32, &i32)| all[start as usize..][..count as usize].to_vec();
        starts.iter().zip(&counts).map(part).collect()
    }

    fn gather(&self, numbers: Vec<f32>) -> Vec<f32> {
        let root = self.world.process_at_rank(0);
        let count = numbers.len() as i32;
        if self.rank() > 0 {
            root.gather_into(&count);
            root.gather_varcount_into(&numbers[..]);
            return Vec::new();
        }
        let mut counts = vec![0i32; self.size()];
        root.gather_into_root(&count, &mut counts[..]);
        let starts = starts(&counts);
        let mut all = vec![0.0; counts.iter().sum::<i32>() as usize];
        root.gather_varcount_into_root(
            &numbers[..],
            &mut PartitionMut::new(&mut all[..], &counts[..], &starts[..]),
        );
        all
    }

    fn share(&self, block: &[f32], blocks: &mut [f32]) {
        self.world.all_gather_into(block, blocks);
    }

    fn exchange(&self, blocks: &[f32], received: &mut [f32]) {
        self.world.all_to_all_into(blocks, received);
    }

    fn end(&self, status: i32) -> ! {
        self.world.abort(status)
    }
}

/// Where parts of these lengths start, one after the other.
fn starts(counts: &[i32]) -> Vec<i32> {
    counts.iter().scan(0, |end, &count| Some(std::mem::replace(end, *end + count))).collect()
}

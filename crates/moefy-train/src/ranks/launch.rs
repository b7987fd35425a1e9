//! What a launcher of several processes, such as `mpirun`, says in the environment.

use std::env;

/// Pairs of variables: how many processes there are, and which one this is. They are those of Open MPI, of MPICH and its
/// relatives, and of Slurm with PMIx, which gives the number of processes in a variable of its own.
const LAUNCHERS: [[&str; 2]; 3] = [
    ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"],
    ["PMI_SIZE", "PMI_RANK"],
    ["SLURM_STEP_NUM_TASKS", "PMIX_RANK"],
];

/// Which of several processes this one is; none where no launcher started several.
pub fn launched_rank() -> Option<usize> {
    rank_in(|name| env::var(name).ok())
}

fn rank_in(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name| variable(name)?.trim().parse::<usize>().ok();
    LAUNCHERS.iter().find_map(|[size, rank]| number(size).filter(|&size| size > 1).and_then(|_| number(rank)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_processes_are_known_by_their_launcher() {
        let rank = |set: &[(&str, &str)]| {
            rank_in(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(rank(&[]), None);
        assert_eq!(rank(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")]), None);
        assert_eq!(rank(&[("OMPI_COMM_WORLD_SIZE", "3"), ("OMPI_COMM_WORLD_RANK", "2")]), Some(2));
        assert_eq!(rank(&[("PMI_SIZE", "2"), ("PMI_RANK", "1")]), Some(1));
        assert_eq!(rank(&[("SLURM_STEP_NUM_TASKS", "4"), ("PMIX_RANK", "0")]), Some(0));
        // several independent processes: without PMIx they are not told of each other
        assert_eq!(rank(&[("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "2")]), None);
        assert_eq!(rank(&[("PMI_SIZE", "many"), ("PMI_RANK", "1")]), None);
    }
}

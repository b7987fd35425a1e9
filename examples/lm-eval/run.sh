#!/usr/bin/env bash
# lm-evaluation-harness (0.4.13, lm_eval[api]) over a running dynamoe-serve:
#   examples/lm-eval/run.sh TOKENIZER_DIR MODEL TASK=FILE…
# such as run.sh path/to/checkpoint NAME@0.75 hellaswag=hellaswag_500.jsonl piqa=piqa_460.jsonl
# URL is the server's address, LM_EVAL the program; further arguments for it are in LM_EVAL_ARGS.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
url=${URL:-http://127.0.0.1:8080}
tokenizer=$1 model=$2
shift 2
tasks=$(mktemp -d)
trap 'rm -rf "$tasks"' EXIT
names=
for task in "$@"; do
    name=${task%%=*}
    sed "s|FILE|$(realpath "${task#*=}")|" "$here/$name.yaml" > "$tasks/$name.yaml"
    names+=${names:+,}dynamoe_$name
done
# shellcheck disable=SC2086
${LM_EVAL:-lm_eval} --model local-completions --include_path "$tasks" --tasks "$names" \
    --model_args "model=$model,base_url=$url/v1/completions,tokenizer=$tokenizer,num_concurrent=1" ${LM_EVAL_ARGS:-}

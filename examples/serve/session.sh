#!/usr/bin/env bash
# A session with a running dynamoe-serve: examples/serve/session.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8080}

echo "# the model and its default dial"
curl -sS --fail-with-body "$url/v1/dynamoe"; echo

echo "# one request at half the sensitivity; usage.mean_ffn_width says what it used"
curl -sS --fail-with-body "$url/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "default", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "sensitivity": 0.5}'; echo

echo "# the same at the dense model's width, streamed"
curl -sSN --fail-with-body "$url/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "default", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "sensitivity": 1, "stream": true}'

echo "# another default for everybody (from this machine, or with the server's --token)"
curl -sS --fail-with-body -X PUT "$url/v1/dynamoe" -H 'Content-Type: application/json' -d '{"sensitivity": 0.8}'; echo

echo "# what the experts did"
curl -sS --fail-with-body "$url/metrics" | grep '^dynamoe_' | head -n 8

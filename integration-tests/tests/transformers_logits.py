"""What tests/transformers.rs runs: loads checkpoints with transformers, and prints logits at several dials as JSON.

A job is {"folder": …, "tokens": […], "dials": [{"sensitivity": 0.5}, {"budget": 0.75}, …]}, one for each line of stdin.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, logging

logging.set_verbosity_error()


def answer(job):
    model = AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True, dtype=torch.float32)
    tokens = torch.tensor([job["tokens"]])
    logits, widths = [], []
    for dial in job["dials"]:
        with torch.no_grad(), model.dial(**dial):
            logits.append(model(tokens).logits[0].tolist())
            widths.append(model.mean_ffn_width())
    # a dial for one call of generate, and gradients through routing
    longer = model.generate(tokens, max_new_tokens=2, do_sample=False, sensitivity=0.5, pad_token_id=0)
    with model.dial(sensitivity=0.5):
        model(tokens, labels=tokens).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    return {"logits": logits, "widths": widths, "generated": longer.shape[1] - tokens.shape[1], "trained": trained}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)

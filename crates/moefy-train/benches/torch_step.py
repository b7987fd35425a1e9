"""The dense training step of `examples/step_speed.rs` in PyTorch: the same shape and batch, AdamW, clipping.

    pip install torch transformers
    python crates/moefy-train/benches/torch_step.py [RUNS]

Measures f32, bf16 by autocast, and bf16 weights, each as it is and compiled.
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# SmolLM2-135M's
CONFIG = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=512,
)
SEQUENCES, POSITIONS = 4, 256


def measure(name, runs, dtype, autocast, compiled):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    times = []
    for _ in range(runs + 2):  # the first compiles, the second warms up
        tokens = torch.randint(0, CONFIG["vocab_size"], (SEQUENCES, POSITIONS))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    times = sorted(times[2:])
    best, median, worst = (SEQUENCES * POSITIONS / x for x in (times[0], times[len(times) // 2], times[-1]))
    print(f"torch {torch.__version__} {name}: {median:.0f} tokens/s (best {best:.0f}, worst {worst:.0f}), "
          f"loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for compiled in (False, True):
        after = ", compiled" if compiled else ""
        measure("f32" + after, runs, torch.float32, False, compiled)
        measure("autocast to bf16" + after, runs, torch.float32, True, compiled)
        measure("bf16 weights" + after, runs, torch.bfloat16, False, compiled)

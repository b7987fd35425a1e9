#!/usr/bin/env python3
"""Times the dense SwiGLU FFN in PyTorch, to stand beside the example `gpu`: same shapes, CUDA graphs, cold weights."""

import json
import statistics

import torch

SHAPES = [("Llama-3.2-1B", 2048, 8192), ("Qwen3-4B", 2560, 9728), ("Mistral-7B", 4096, 14336)]
TOKENS = [1, 2, 4, 8, 32, 128, 512, 2048]
COLD_BYTES = 512 << 20


def ffn(x, gate, up, down):
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T


def microseconds(layers, x):
    """Median over repeats of one layer's time, all layers in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers[:2]:
            ffn(x, *layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            ffn(x, *layer)
    times = []
    for repeat in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return statistics.median(times), min(times), max(times)


@torch.inference_mode()
def main():
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device")
    for model, d, i in SHAPES:
        count = min(24, -(-COLD_BYTES // (3 * d * i * 2 // 4)))

        def matrix(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_(-0.02, 0.02)

        layers = [(matrix(i, d), matrix(i, d), matrix(d, i)) for _ in range(count)]
        for tokens in TOKENS:
            x = torch.rand(tokens, d, device="cuda").to(torch.bfloat16)
            median, low, high = microseconds(layers, x)
            row = {"model": model, "what": "torch dense", "tokens": tokens, "us": median, "us_low": low, "us_high": high}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""The dense training step of `examples/step_speed.rs` in JAX: same shapes, same AdamW, the whole step jitted.

    pip install 'jax[cpu]'
    python crates/moefy-train/benches/jax_step.py [RUNS [CASE]]
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# name: D, I, L, H, K, d, V, sequences, positions
CASES = {
    "stories260k": (64, 172, 5, 8, 4, 8, 512, 16, 256),
    "15M": (288, 768, 6, 6, 6, 48, 32000, 4, 256),
}


def init(shape):
    d, i, layers, h, k, head, v, _, _ = shape
    rng = np.random.default_rng(0)
    w = lambda *s: jnp.asarray(rng.normal(0, 0.05, s), jnp.float32)
    layer = lambda: {
        "norm1": jnp.ones(d), "norm2": jnp.ones(d),
        "q": w(h * head, d), "k": w(k * head, d), "v": w(k * head, d), "o": w(d, h * head),
        "gate": w(i, d), "up": w(i, d), "down": w(d, i),
    }
    return {"embed": w(v, d), "norm": jnp.ones(d), "layers": [layer() for _ in range(layers)]}


def rms_norm(x, w):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w


def rope(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def loss(params, tokens, targets, shape):
    _, _, _, h, k, head, _, batch, t = shape
    angles = np.arange(t)[:, None] * 10000.0 ** (-np.arange(0, head, 2) / head)
    cos, sin = (jnp.asarray(f(angles)[None, :, None, :], jnp.float32) for f in (np.cos, np.sin))
    mask = jnp.tril(jnp.ones((t, t), bool))
    x = params["embed"][tokens]
    for p in params["layers"]:
        y = rms_norm(x, p["norm1"])
        q = rope((y @ p["q"].T).reshape(batch, t, h, head), cos, sin).reshape(batch, t, k, h // k, head)
        key = rope((y @ p["k"].T).reshape(batch, t, k, head), cos, sin)
        value = (y @ p["v"].T).reshape(batch, t, k, head)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, key) / head**0.5
        probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        y = jnp.einsum("bkgts,bskd->btkgd", probabilities, value).reshape(batch, t, h * head)
        x = x + y @ p["o"].T
        y = rms_norm(x, p["norm2"])
        x = x + (jax.nn.silu(y @ p["gate"].T) * (y @ p["up"].T)) @ p["down"].T
    logits = rms_norm(x, params["norm"]) @ params["embed"].T
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


@partial(jax.jit, static_argnames="shape", donate_argnums=(0, 1, 2))
def step(params, m, v, t, tokens, targets, shape):
    value, grads = jax.value_and_grad(loss)(params, tokens, targets, shape)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
    update = lambda w, m, v: w - 1e-3 * (
        m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.95**t)) + 1e-8) + (0.1 * w if w.ndim > 1 else 0))
    return jax.tree.map(update, params, m, v), m, v, value


def measure(name, shape, runs):
    batch, t = shape[-2:]
    params = init(shape)
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    rng = np.random.default_rng(1)
    times = []
    for n in range(runs + 2):  # the first compiles, the second warms up
        tokens = jnp.asarray(rng.integers(0, shape[6], (batch, t + 1)))
        start = time.perf_counter()
        params, m, v, value = step(params, m, v, float(n + 1), tokens[:, :-1], tokens[:, 1:], shape)
        value.block_until_ready()
        jax.block_until_ready(params)
        times.append(time.perf_counter() - start)
    times = sorted(times[2:])
    rate = [batch * t / x for x in (times[0], times[len(times) // 2], times[-1])]
    print(f"jax {jax.__version__} {name}: {rate[1]:.0f} tokens/s (best {rate[0]:.0f}, worst {rate[2]:.0f}), "
          f"{1e3 * times[len(times) // 2]:.0f} ms a step, loss {float(value):.3f}", flush=True)


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    for name, shape in CASES.items():
        if len(sys.argv) < 3 or sys.argv[2] == name:
            measure(name, shape, runs)

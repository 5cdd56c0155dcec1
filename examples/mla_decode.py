"""DeepSeek's latent attention absorbed, checked unabsorbed: python examples/mla_decode.py"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

import cupy as cp
import ml_dtypes

import cuattn

HIDDEN, HEADS, NOPE, ROPE, LATENT, V_DIM = 1024, 16, 128, 64, 512, 128
TOKENS, NEW, PAGE = 1000, 4, 64  # the last NEW are decoded in one call, as a draft would be
SCALE = (NOPE + ROPE) ** -0.5  # of the layer as it was trained, before absorption
BF16 = ml_dtypes.bfloat16
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX leaves CuPy some memory


def random(seed: int, *shape: int, fan_in: int = 1) -> cp.ndarray:
    values = cp.random.default_rng(seed).standard_normal(shape, dtype=cp.float32)
    return values * fan_in**-0.5


def rotate(x: cp.ndarray) -> cp.ndarray:
    """RoPE of [token, …, ROPE], tokens counted from 0."""
    angles = cp.arange(TOKENS)[:, None] * 10000.0 ** -(cp.arange(0, ROPE, 2) / ROPE)
    angles = angles.reshape(TOKENS, *[1] * (x.ndim - 2), ROPE // 2).astype(cp.float32)
    cos, sin = cp.cos(angles), cp.sin(angles)
    even, odd = x[..., ::2], x[..., 1::2]
    return cp.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def main() -> None:
    """One layer on one text, both ways; then from other frameworks, then with skipping."""
    topics = cp.repeat(random(0, -(-TOKENS // 64), HIDDEN), 64, axis=0)[:TOKENS]
    hidden = 1.2 * topics + 0.4 * random(1, TOKENS, HIDDEN)
    down = random(2, HIDDEN, LATENT, fan_in=HIDDEN)
    up_k = random(3, HEADS, LATENT, NOPE, fan_in=LATENT)
    up_v = random(4, HEADS, LATENT, V_DIM, fan_in=LATENT)
    to_rope = random(5, HIDDEN, ROPE, fan_in=HIDDEN)
    to_q_rope = random(6, HEADS, HIDDEN, ROPE, fan_in=HIDDEN)

    latent, k_rope = hidden @ down, rotate(hidden @ to_rope)  # all that the cache holds
    q_nope = (latent @ up_k).transpose(1, 0, 2)  # [token, head, NOPE]; it looks for what is alike
    q_rope = rotate((hidden @ to_q_rope).transpose(1, 0, 2))

    # As trained: keys and values of every head.
    q = cp.concatenate((q_nope, q_rope), -1)[None].astype(BF16)
    shared = cp.broadcast_to(k_rope[:, None], (TOKENS, HEADS, ROPE))
    k = cp.concatenate(((latent @ up_k).transpose(1, 0, 2), shared), -1)[None].astype(BF16)
    v = (latent @ up_v).transpose(1, 0, 2)[None].astype(BF16)
    expected = cuattn.prefill(q, k, v, causal=True, scale=SCALE)[0, -NEW:].astype(cp.float32)

    # Absorbed: up_k belongs to q, up_v to the output, and all heads share one row a token.
    absorbed = (q_nope[-NEW:].transpose(1, 0, 2) @ up_k.transpose(0, 2, 1)).transpose(1, 0, 2)
    q = cp.concatenate((absorbed, q_rope[-NEW:]), -1)[None].astype(BF16)
    pages = -(-TOKENS // PAGE)
    cache = cp.zeros((pages, PAGE, LATENT + ROPE), dtype=BF16)
    tables, lengths = cp.arange(pages, dtype="i4")[None, ::-1].copy(), cp.array([TOKENS], "i4")
    ends = cp.array([0, TOKENS], "i4")
    cuattn.append_mla_kv(cache, latent.astype(BF16), k_rope.astype(BF16), tables, lengths, ends)
    inputs = (q, cache, tables, lengths)
    out = cuattn.mla_decode(*inputs, scale=SCALE)
    heads = (out[0].astype(cp.float32).transpose(1, 0, 2) @ up_v).transpose(1, 0, 2)
    error = float(abs(heads - expected).max() / abs(expected).max())
    print(f"dense: absorbed and unabsorbed differ by {error:.2%}")
    assert error < 0.02
    for name in filter(find_spec, ("torch", "jax")):
        theirs = map(import_module(name.replace("jax", "jax.numpy")).from_dlpack, inputs)
        assert bool((cuattn.mla_decode(*theirs, scale=SCALE) == out).all()), name

    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(max_dropped_mass=0.01, stats=stats)
    cuattn.mla_decode(*inputs, scale=SCALE, skip_softmax=skip)
    print(f"skip:  {stats.skipped} of {stats.visited} tiles, no row lost more than 1 %")
    assert stats.rate > 0.3


if __name__ == "__main__":
    if not cp.cuda.is_available():
        sys.exit("This example wants an NVIDIA GPU and its driver; there is none here.")
    main()

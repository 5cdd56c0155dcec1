"""Attention on JAX arrays, checked against JAX's: python examples/from_jax.py"""

from __future__ import annotations

import os
import sys

# JAX would take most of the GPU's memory at its start, and CuPy needs some for results.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import cuattn
from cuattn.interop import jax as cuattn_jax


def paragraphs(seq: int, heads: int, dim: int) -> tuple[jax.Array, ...]:
    """Q, K, V of a text whose paragraphs of 64 tokens attend to themselves."""
    first, second = jax.random.split(jax.random.key(0))
    topic = jax.random.normal(first, (seq // 64, heads, dim))
    noise = jax.random.normal(second, (3, 1, seq, heads, dim))
    alike = 1.5 * jnp.repeat(topic, 64, axis=0)
    q, k, v = alike + 0.3 * noise[0], alike + 0.3 * noise[1], noise[2]
    return tuple(x.astype(jnp.bfloat16) for x in (q, k, v))


@jax.jit
def sparse(q: jax.Array, k: jax.Array, v: jax.Array, threshold: jax.Array) -> tuple[jax.Array, ...]:
    """Attention in a compiled function, with the votes on tiles that it skipped or visited."""
    skip = cuattn.SkipSoftmax(threshold=threshold)
    return cuattn_jax.prefill(q, k, v, causal=True, skip_softmax=skip, return_counts=True)


def main() -> None:
    """Dense attention outside of `jax.jit`, then inside, without the tiles that hardly count."""
    if jax.default_backend() != "gpu":
        sys.exit("This example wants an NVIDIA GPU that JAX can use; there is none here.")
    q, k, v = paragraphs(seq=2048, heads=8, dim=128)  # [1, seq, heads, dim]

    out = jnp.from_dlpack(cuattn.prefill(q, k, v, causal=True))

    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    error = float(jnp.abs(out - expected).max())
    print(f"dense: {out.shape} {out.dtype}, at most {error:.4f} from JAX's")
    assert error < 0.05

    result, counts = sparse(q, k, v, jnp.array([0.01], jnp.float32))

    visited, skipped, _ = (int(plane.sum()) for plane in counts)
    change = float(jnp.abs(result - out).max())
    print(
        f"skip:  {skipped} of {visited} tiles ({skipped / visited:.0%}) inside jax.jit, "
        f"outputs moved by at most {change:.4f}"
    )
    assert skipped > 0.3 * visited


if __name__ == "__main__":
    main()

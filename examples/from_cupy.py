"""Attention on CuPy arrays, checked against the NumPy reference: python examples/from_cupy.py"""

from __future__ import annotations

import sys

import cupy
import ml_dtypes

import cuattn
from cuattn import reference


def paragraphs(seq: int, heads: int, dim: int) -> tuple[cupy.ndarray, ...]:
    """Q, K, V of a text whose paragraphs of 64 tokens attend to themselves."""
    random = cupy.random.default_rng(0)
    topic = random.standard_normal((seq // 64, heads, dim), dtype=cupy.float32)
    noise = random.standard_normal((3, 1, seq, heads, dim), dtype=cupy.float32)
    alike = 1.5 * cupy.repeat(topic, 64, axis=0)
    q, k, v = alike + 0.3 * noise[0], alike + 0.3 * noise[1], noise[2]
    return tuple(x.astype(ml_dtypes.bfloat16) for x in (q, k, v))


def main() -> None:
    """Dense attention, then without the tiles that hardly count."""
    if not cupy.cuda.is_available():
        sys.exit("This example wants an NVIDIA GPU and its driver; there is none here.")
    q, k, v = paragraphs(seq=1024, heads=4, dim=128)

    out, lse = cuattn.prefill(q, k, v, causal=True, return_lse=True)

    exact = reference.prefill(*(cupy.asnumpy(x) for x in (q, k, v)), causal=True).out
    error = abs(cupy.asnumpy(out).astype(float) - exact).max()
    print(f"dense: {out.shape} {out.dtype}, at most {error:.4f} from float64")
    assert error < 0.03

    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.01, stats=stats)
    sparse, kept = cuattn.prefill(q, k, v, causal=True, skip_softmax=skip, return_lse=True)

    left_out = float((1 - cupy.exp(kept - lse)).max())
    change = float(abs(sparse.astype(cupy.float32) - out.astype(cupy.float32)).max())
    print(
        f"skip:  {stats.skipped} of {stats.visited} tiles ({stats.rate:.0%}), "
        f"no row lost more than {left_out:.2%} of its weights, outputs moved by {change:.4f}"
    )
    assert stats.rate > 0.3


if __name__ == "__main__":
    main()

"""Tokens over a paged cache by one CUDA graph, from CuPy: python examples/paged_decode.py"""

from __future__ import annotations

import sys

import cupy
import ml_dtypes

import cuattn

PROMPT, NEW, PAGE = 2000, 200, 64
HEADS, KV_HEADS, DIM = 8, 2, 128


def paragraphs(heads: int, noise: float, seed: int) -> cupy.ndarray:
    """Q, K or V of a text whose paragraphs of 64 tokens are alike, ``[token, head, dim]``."""
    topic = cupy.random.default_rng(0).standard_normal((64, 1, DIM), dtype=cupy.float32)
    random = cupy.random.default_rng(seed)
    rest = random.standard_normal((PROMPT + NEW, heads, DIM), dtype=cupy.float32)
    alike = 1.5 * cupy.repeat(topic, 64, axis=0)[: PROMPT + NEW]
    return (alike + noise * rest).astype(ml_dtypes.bfloat16)


def generate(stream: cupy.cuda.Stream) -> None:
    """Prefill a prompt, decode one token after the other, compare with prefill of everything."""
    q, k, v = paragraphs(HEADS, 0.3, 1), paragraphs(KV_HEADS, 0.3, 2), paragraphs(KV_HEADS, 1.0, 3)
    pages, prompt_pages = -(-(PROMPT + NEW) // PAGE), -(-PROMPT // PAGE)
    cache = cupy.zeros((pages, 2, KV_HEADS, PAGE, DIM), dtype=ml_dtypes.bfloat16)
    free = cupy.arange(pages, dtype="i4")[::-1]  # pages in the order in which they are handed out
    tables = cupy.full((1, pages), -1, dtype="i4")
    tables[0, :prompt_pages] = free[:prompt_pages]
    lengths, ends = cupy.array([PROMPT], dtype="i4"), cupy.array([0, PROMPT], dtype="i4")
    cuattn.append_kv(cache, k[:PROMPT], v[:PROMPT], tables, lengths, ends)
    out = cupy.empty((PROMPT + NEW, HEADS, DIM), dtype=q.dtype)
    out[:PROMPT] = cuattn.prefill_paged(q[:PROMPT], cache, tables, lengths, ends)

    new_q, new_k, new_v = (x[:1].copy() for x in (q, k, v))  # [1, heads, dim]
    result = cupy.empty_like(new_q)

    def step() -> None:
        cuattn.append_kv(cache, new_k, new_v, tables, lengths)
        cuattn.decode(new_q, cache, tables, lengths, out=result)

    for i in range(PROMPT, PROMPT + NEW):  # all that changes is on the device
        new_q[0], new_k[0], new_v[0] = q[i], k[i], v[i]
        lengths.fill(i + 1)
        tables[0, i // PAGE] = free[i // PAGE]
        if i == PROMPT:
            step()  # compiled and loaded before the capture
            stream.begin_capture()
            step()
            graph = stream.end_capture()
        graph.launch()
        out[i] = result[0]

    expected = cuattn.prefill(q[None], k[None], v[None], causal=True)[0]
    error = float(abs(out.astype(cupy.float32) - expected.astype(cupy.float32)).max())
    print(f"dense: {NEW} tokens by one graph, at most {error:.4f} from prefill of the whole text")
    assert error < 0.05

    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(max_dropped_mass=0.01, certificate=True, stats=stats)
    _, lost = cuattn.decode(new_q, cache, tables, lengths, skip_softmax=skip)
    print(
        f"skip:  {stats.skipped} of {stats.visited} tiles ({stats.rate:.0%}), "
        f"no row lost more than {float(lost.max()):.2%} of its weights"
    )
    assert stats.rate > 0.3


if __name__ == "__main__":
    if not cupy.cuda.is_available():
        sys.exit("This example wants an NVIDIA GPU and its driver; there is none here.")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        generate(stream)

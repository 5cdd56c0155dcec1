"""Attention on PyTorch tensors, checked against PyTorch's: python examples/from_torch.py"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

import cuattn


def paragraphs(seq: int, heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Q, K, V of a text whose paragraphs of 64 tokens attend to themselves."""
    random = torch.Generator("cuda").manual_seed(0)
    topic = torch.randn(seq // 64, heads, dim, device="cuda", generator=random)
    noise = torch.randn(3, 1, seq, heads, dim, device="cuda", generator=random)
    alike = 1.5 * topic.repeat_interleave(64, dim=0)
    q, k, v = alike + 0.3 * noise[0], alike + 0.3 * noise[1], noise[2]
    return tuple(x.bfloat16() for x in (q, k, v))


def main() -> None:
    """Dense attention into a tensor of ours, then without the tiles that hardly count."""
    if not torch.cuda.is_available():
        sys.exit("This example wants an NVIDIA GPU and its driver; there is none here.")
    q, k, v = paragraphs(seq=4096, heads=8, dim=128)  # [1, seq, heads, dim]

    out = torch.empty_like(q)
    cuattn.prefill(q, k, v, causal=True, out=out)  # on torch's current stream

    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)
    error = (out - expected).abs().max().item()
    print(f"dense: {tuple(out.shape)} {out.dtype}, at most {error:.4f} from PyTorch's")
    assert error < 0.05

    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.01, stats=stats)
    result = cuattn.prefill(q, k, v, causal=True, skip_softmax=skip)

    sparse = torch.from_dlpack(result)  # results are CuPy arrays; this copies nothing
    change = (sparse - out).abs().max().item()
    print(
        f"skip:  {stats.skipped} of {stats.visited} tiles ({stats.rate:.0%}), "
        f"outputs moved by at most {change:.4f}"
    )
    assert stats.rate > 0.3


if __name__ == "__main__":
    main()

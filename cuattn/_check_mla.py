"""A call of MLA decode → `Problem`, or one clear error; see `_check`."""

from __future__ import annotations

from . import _check, _check_arrays
from ._check import Options
from ._records import Problem, View

LATENT, ROPE = 512, 64  # columns of the cache's rows
ROW = LATENT + ROPE
PAGE_SIZES = (16, 32, 64, 128)
MOST_HEADS = 128
_LAYOUT = f"latent {LATENT}, rope {ROPE}"


def mla_decode(
    q: View,
    kv_cache: View,
    block_tables: View,
    seq_lens: View,
    cu_seqlens_q: View | None,
    layout: str,
    options: Options,
) -> Problem:
    """Check q of few tokens a request against a cache [pages, 1, page_size, 576] and a table.

    Its rows are the keys, their latent columns the values; `layout` is of no use here.
    """
    rank, wanted = _check.decode_rank(q, cu_seqlens_q is not None)
    if len(q.shape) != rank:
        raise ValueError(f"q has shape {q.shape}; wanted {rank} axes {wanted}")
    for name, view in (("q", q), ("kv_cache", kv_cache)):
        _check_arrays.input_array(name, view, q)
    pages, _, page_size, row = kv_cache.shape
    if row != ROW:
        raise ValueError(f"kv_cache has rows of {row}; wanted {ROW} ({_LAYOUT})")
    if page_size not in PAGE_SIZES:
        *most, last = PAGE_SIZES
        raise ValueError(
            f"kv_cache has page size {page_size}; wanted {', '.join(map(str, most))} or {last}"
        )
    heads, head_dim = q.shape[-2:]
    if head_dim != ROW:
        raise ValueError(f"q has head_dim {head_dim}; wanted {ROW} ({_LAYOUT})")
    if not 0 < heads <= MOST_HEADS:
        raise ValueError(f"q has {heads} heads; wanted 1 to {MOST_HEADS}")
    if options.scale is None:
        raise TypeError(
            "scale is None; wanted a positive number or one float32 on the device: that of the "
            "layer before absorption"
        )
    latent = kv_cache._replace(shape=(pages, 1, page_size, LATENT))
    return _check.decode_problem(q, kv_cache, latent, block_tables, seq_lens, cu_seqlens_q, options)

"""What ranks know together of every row's largest score, before they skip by it.

Each rank scores the outermost keys that it holds, where attention sinks and the nearest keys are,
in one small call of the kernel that the call itself will run.  Its scores are multiplied until LSE
is their maximum for all purposes,

    max ≤ LSE ≤ max + ln(keys),

so that (LSE − ln(keys)) / sharpness is less than 0.01 below the largest score, and not above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from ..skip_softmax import SkipSoftmax
from ._engines import Engine

_SHARPNESS = 1024.0
_KEYS = 64  # at either end of what a rank holds, or a page if it has more
_NOTHING_GOES = SkipSoftmax(threshold=0.0)


class RankCache(NamedTuple):
    """A rank's pages, and how decode runs on them."""

    call: Callable[..., Any]  # (functions, q, tables, lengths, **options)
    page_size: int
    columns: int  # of an output


def shared_seeds(
    engine: Engine, cache: RankCache, rows: tuple[Any, Any, Any], scores: dict[str, Any]
) -> Any:
    """Return seeds for requests of one token each: the largest that any rank has found.

    Parameters
    ----------
    engine : Engine
    cache : RankCache
    rows : tuple of arrays
        q ``[row, heads, head_dim]``, block_tables ``[row, max_pages]`` and seq_lens ``[row]``.
    scores : dict
        Options that are in units of scores, `scale` among them.

    Returns
    -------
    array, float32 ``[row, heads]``
    """
    q, tables, lengths = rows
    few, held, keys = _outermost(engine, tables, lengths, cache.page_size)
    sharper = {name: _sharper(engine, name, value) for name, value in scores.items()}

    def run(functions: Any, **results: Any) -> Any:
        options = {"return_lse": True, "out_dtype": "float32", "skip_softmax": _NOTHING_GOES}
        return cache.call(functions, q, few, held, **sharper, **options, **results)

    lse = engine.largest(run, (*q.shape[:-1], cache.columns))
    return (lse - math.log(max(keys, 1))) * (1 / _SHARPNESS)


def _sharper(engine: Engine, name: str, value: Any) -> Any:
    """Return what makes scores as many times larger."""
    if value is None:  # for the call to refuse
        return None
    if isinstance(value, Real):
        return float(value) * _SHARPNESS
    engine.view(value, name)
    return engine.array(value) * _SHARPNESS


def _outermost(engine: Engine, tables: Any, lengths: Any, page_size: int) -> tuple[Any, Any, int]:
    """Return tables and lengths of the first and the last pages, and their keys at most."""
    first = max(_KEYS // max(page_size, 1), 1)
    count = 2 * first + 1  # since the last page may hold one key
    width = tables.shape[1]
    if width <= count:
        return tables, lengths, width * page_size
    lengths = engine.array(lengths).clip(0, width * page_size)
    passed = ((lengths + (page_size - 1)) // page_size - count).clip(0, width)

    def chosen(column: Any) -> Any:
        return column + passed[:, None] * (column >= first)

    few = engine.columns(tables, chosen, count)
    return few, lengths - passed * page_size, count * page_size

"""cuattn's functions inside `jax.jit`: launched on XLA's stream, results in XLA's memory.

Each function is that of the same name in `cuattn`, whose docstring says what shapes, dtypes and
options mean. What differs is the same for all of them:

- Arguments and results are JAX arrays; there is no `out`, `lse` or `stream`. Options are static;
  arrays among them (`scale`, `sinks`, a `threshold`) are operands and may be traced.
- Shapes, dtypes and options are checked while a call is traced, so `jax.eval_shape` works and wrong
  ones are the same errors as elsewhere. Rows that belong to no request hold anything.
- `return_counts=True` returns votes as one more result, uint32 ``[3, batch, q_heads]``: visited,
  skipped, ineligible. `SkipSoftmax.stats` counts in place and is refused. Results come in the order
  output, LSE, certificate (`certificate=True`), counts.
- `append_kv` and `append_mla_kv` return the cache. It is the same memory if the caller donates it
  (``jax.jit(…, donate_argnums=…)``, or a carry of `jax.lax.scan`); else XLA copies it before.
- `jax.vmap` over `prefill`, `decode`, `mla_decode` and a list of `merge_states` becomes part of the
  batch where the caches, `sinks` and scales are not mapped. Anything else runs call after call.
- `jax.grad` is refused: these are kernels for inference.
- On a GPU a call is captured when XLA makes a CUDA graph (`command_buffer_compatible`).
- On the CPU `buffer_callback` hands over XLA's buffers, too, and the emulator runs; it has to be
  asked for by ``CUATTN_EMULATOR=1``, or `cuattn.emulator.enabled()` until results are there.

Memory for partial results of decode is CuPy's: leave it some of the GPU
(``XLA_PYTHON_CLIENT_MEM_FRACTION``, or ``XLA_PYTHON_CLIENT_PREALLOCATE=false``).

Outside of `jax.jit`, arrays of JAX may also be given to `cuattn`'s own functions, and
`jax.numpy.from_dlpack` copies nothing of what they return.
"""

from __future__ import annotations

from typing import Any

from .. import _call, _check, _check_mla, _check_tools
from ..skip_softmax import SkipSoftmax
from ._jax_call import Call, Operands, Result, bind, cache_operands, operand, view
from ._jax_forms import (
    Asked,
    appended,
    cache_views,
    decode_requests,
    paged_operands,
    part_views,
    parts_operand,
    place_operands,
    place_views,
)

__all__ = [
    "append_kv",
    "append_mla_kv",
    "decode",
    "merge_states",
    "mla_decode",
    "prefill",
    "prefill_paged",
    "prefill_ragged",
]


def prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    return_counts: bool = False,
    out_dtype: Any = None,
) -> Any:
    """Attention over whole sequences of equal length, as `cuattn.prefill`.

    Parameters
    ----------
    q, k, v, causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax, return_lse, \
out_dtype
        As in `cuattn.prefill`.
    return_counts : bool
        Return votes, uint32 ``[3, batch, q_heads]``: visited, skipped, ineligible. Wants
        `skip_softmax`.

    Returns
    -------
    jax.Array, or a tuple of them
        The output and what else was asked for.

    Raises
    ------
    ValueError, TypeError
        While the call is traced, naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import prefill
    >>> x = jnp.ones((1, 64, 8, 128), jnp.bfloat16)
    >>> jax.eval_shape(jax.jit(lambda x: prefill(x, x, x, causal=True)), x).shape
    (1, 64, 8, 128)
    """
    operands = {"q": operand(q, "q"), "k": operand(k, "k"), "v": operand(v, "v")}
    given = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    asked = Asked("prefill", _call.BATCHED, return_lse, return_counts, frozenset(operands))
    return asked.attend(operands, (*given, None, None, out_dtype, None))


def prefill_ragged(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    *,
    causal: bool = False,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    return_counts: bool = False,
    out_dtype: Any = None,
) -> Any:
    """Attention over sequences that lie end to end, as `cuattn.prefill_ragged`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import prefill_ragged
    >>> x, ends = jnp.ones((300, 8, 64), jnp.float16), jnp.array([0, 100, 300])
    >>> jax.eval_shape(lambda x: prefill_ragged(x, x, x, ends, ends), x).shape
    (300, 8, 64)
    """
    operands = {"q": operand(q, "q"), "k": operand(k, "k"), "v": operand(v, "v")}
    operands["cu_seqlens_q"] = operand(cu_seqlens_q, "cu_seqlens_q")
    operands["cu_seqlens_kv"] = operand(cu_seqlens_kv, "cu_seqlens_kv")
    given = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    asked = Asked("prefill_ragged", _call.RAGGED, return_lse, return_counts)
    return asked.attend(operands, (*given, None, None, out_dtype, None))


def prefill_paged(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    *,
    layout: str = "HND",
    causal: bool = True,
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    return_lse: bool = False,
    return_counts: bool = False,
    out_dtype: Any = None,
) -> Any:
    """Attention of new tokens over a paged cache, as `cuattn.prefill_paged`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import prefill_paged
    >>> q, cache = jnp.ones((5, 8, 128), "f2"), jnp.zeros((10, 2, 8, 64, 128), "f2")
    >>> rest = jnp.array([[3, 7]]), jnp.array([100]), jnp.array([0, 5])
    >>> jax.eval_shape(lambda q: prefill_paged(q, cache, *rest), q).shape
    (5, 8, 128)
    """
    operands = paged_operands(q, kv_cache, block_tables, seq_lens, cu_seqlens_q)
    given = (causal, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    asked = Asked("prefill_paged", _call.PAGED, return_lse, return_counts)
    return asked.attend(operands, (*given, None, None, out_dtype, None), layout)


def decode(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    cu_seqlens_q: Any = None,
    layout: str = "HND",
    window_left: int = -1,
    scale: Any = None,
    out_scale: Any = None,
    soft_cap: float = 0.0,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    return_counts: bool = False,
    out_dtype: Any = None,
) -> Any:
    """Attention of each request's newest tokens over a paged cache, as `cuattn.decode`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import decode
    >>> q, cache = jnp.ones((1, 32, 128), "f2"), jnp.zeros((10, 2, 8, 64, 128), "f2")
    >>> tables, lengths = jnp.array([[3, 7]]), jnp.array([100])
    >>> jax.eval_shape(lambda q: decode(q, cache, tables, lengths), q).shape
    (1, 32, 128)
    """
    operands = paged_operands(q, kv_cache, block_tables, seq_lens, cu_seqlens_q)
    given = (True, window_left, scale, out_scale, soft_cap, sinks, skip_softmax)
    asked = Asked("decode", _call.DECODE, return_lse, return_counts, decode_requests(operands))
    return asked.attend(operands, (*given, None, None, out_dtype, batch_invariant), layout)


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    scale: Any,
    cu_seqlens_q: Any = None,
    out_scale: Any = None,
    sinks: Any = None,
    skip_softmax: SkipSoftmax | None = None,
    sparse_indices: Any = None,
    latent_dim: int | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    return_counts: bool = False,
    out_dtype: Any = None,
) -> Any:
    """Multi-head latent attention of each request's newest tokens, as `cuattn.mla_decode`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import mla_decode
    >>> q, cache = jnp.ones((1, 128, 576), "f2"), jnp.zeros((10, 64, 576), "f2")
    >>> tables, lengths = jnp.array([[3, 7]]), jnp.array([100])
    >>> jax.eval_shape(lambda q: mla_decode(q, cache, tables, lengths, scale=192**-0.5), q).shape
    (1, 128, 512)
    """
    operands = paged_operands(q, kv_cache, block_tables, seq_lens, cu_seqlens_q)
    _check_mla.keys_given(block_tables, sparse_indices)
    sparse = sparse_indices is not None
    if sparse:
        operands["sparse_indices"] = operand(sparse_indices, "sparse_indices")
        if block_tables is not None:
            unread = (view(operands[name]) for name in ("block_tables", "seq_lens", "q"))
            _check.tables(*unread)
    form = _call.mla(_check_mla.latent_dim(latent_dim), sparse)
    given = (True, -1, scale, out_scale, 0.0, sinks, skip_softmax)
    more = (("latent_dim", latent_dim),)
    requests = decode_requests(operands)
    asked = Asked("mla_decode", form, return_lse, return_counts, requests, more)
    return asked.attend(operands, (*given, None, None, out_dtype, batch_invariant), "HND")


def merge_states(outs: Any, lses: Any, *, out_dtype: Any = None) -> tuple[Any, Any]:
    """Merge attention results of the same queries over disjoint keys, as `cuattn.merge_states`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import merge_states
    >>> parts = jnp.ones((2, 5, 8, 64), "f2"), jnp.zeros((2, 5, 8))
    >>> [x.shape for x in jax.eval_shape(merge_states, *parts)]
    [(5, 8, 64), (5, 8)]
    """
    operands = {"outs": parts_operand(outs, "outs"), "lses": parts_operand(lses, "lses")}
    views, sums = (part_views(x, name) for name, x in operands.items())
    dtype = _check_tools.merge(views, sums, None, None, out_dtype)
    shape = views[0].shape
    results = (Result("out", shape, dtype), Result("lse", shape[:-1], "float32"))
    listed = isinstance(operands["outs"], list) and isinstance(operands["lses"], list)

    def again(operands: Operands) -> tuple[Any, ...]:
        return merge_states(**operands, out_dtype=out_dtype)

    call = Call("merge_states", (("out_dtype", dtype),), results)
    out, lse = bind(call, operands, again, frozenset(operands) if listed else frozenset())
    return out, lse


def append_kv(
    kv_cache: Any,
    k_new: Any,
    v_new: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_new: Any = None,
    *,
    layout: str = "HND",
) -> Any:
    """Return a cache with the keys and values of new tokens, as `cuattn.append_kv` leaves it.

    Donate the cache, so that it is written in place and not copied.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import append_kv
    >>> cache, x = jnp.zeros((10, 2, 8, 64, 128), "f2"), jnp.ones((1, 8, 128), "f2")
    >>> rest = jnp.array([[3, 7]]), jnp.array([100])
    >>> write = jax.jit(append_kv, donate_argnums=0)
    >>> jax.eval_shape(write, cache, x, x, *rest).shape
    (10, 2, 8, 64, 128)
    """
    operands = {
        "kv_cache": cache_operands(kv_cache),
        "k_new": operand(k_new, "k_new"),
        "v_new": operand(v_new, "v_new"),
        **place_operands(block_tables, seq_lens, cu_seqlens_new),
    }
    new = (view(operands["k_new"]), view(operands["v_new"]))
    caches = cache_views(operands["kv_cache"])
    _check_tools.append((*caches, *new, *place_views(operands)), layout)
    return appended("append_kv", operands, (("layout", layout),))


def append_mla_kv(
    kv_cache: Any,
    c_kv_new: Any,
    k_pe_new: Any,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_new: Any = None,
) -> Any:
    """Return an MLA cache with new tokens, as `cuattn.append_mla_kv` leaves it.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from cuattn.interop.jax import append_mla_kv
    >>> cache = jnp.zeros((10, 64, 576), "f2")
    >>> new = jnp.ones((1, 512), "f2"), jnp.ones((1, 64), "f2")
    >>> rest = jnp.array([[3, 7]]), jnp.array([100])
    >>> jax.eval_shape(append_mla_kv, cache, *new, *rest).shape
    (10, 64, 576)
    """
    operands = {
        "kv_cache": operand(kv_cache, "kv_cache"),
        "c_kv_new": operand(c_kv_new, "c_kv_new"),
        "k_pe_new": None if k_pe_new is None else operand(k_pe_new, "k_pe_new"),
        **place_operands(block_tables, seq_lens, cu_seqlens_new),
    }
    k_pe = None if k_pe_new is None else view(operands["k_pe_new"])
    ragged = cu_seqlens_new is not None
    new = (view(operands["c_kv_new"]), k_pe, ragged)
    copied = _check_tools.mla_views(view(operands["kv_cache"]), *new)
    views = (*copied, *place_views(operands))
    _check_tools.append(views, "HND", _check_tools.APPEND_MLA)
    return appended("append_mla_kv", operands, ())

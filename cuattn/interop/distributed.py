"""Context parallelism: every rank attends to its part of the keys, and the parts are merged.

All ranks have the same queries and get the same result. A rank's outputs and log-sum-exps (float32)
go to all others in one exchange, and `cuattn.merge_states` merges them. One class serves three
frameworks, by what it is given:

- ``ContextParallel(torch.distributed.group.WORLD)``: PyTorch's tensors, over NCCL or gloo
- ``ContextParallel(cupyx.distributed.init_process_group(…))``: any CUDA arrays, over NCCL
- ``ContextParallel("ranks")``: JAX's arrays, inside `jax.shard_map` over the axis of that name

**Who holds what.** In `prefill` rank 0 holds the first keys, rank 1 those behind, and so on; ranks
may hold unequal numbers, or none. In `decode` and `mla_decode` blocks of keys are dealt to the
ranks in turn, and `visible_keys` says how many each holds; one block a rank is a contiguous range.
In all of them a rank's keys are in their order, so what a causal query sees of them is a beginning.

**Skipping.** With a threshold, decode's ranks share seeds, so that one with light keys knows of the
heavy ones elsewhere: each scores its first and last 64 keys or more, whole pages, in a small
launch, and the largest scores, float32 ``[tokens, heads]``, go to all ranks in an exchange before
the call itself. That and some arithmetic on tables and lengths, all on the device, is what every
such call costs more. By the reference, of structured heads with 128K keys at 1 % left out, 96 % of
the tiles are skipped on one GPU, and 96 % on two or eight ranks (94 and 91 % if each judged by its
own keys); with blocks of 64 keys in turn, 95 % on eight (72 %). Each rank keeps its own seed tiles.
In `prefill` nothing is shared: a rank's running maximum begins with its own first tile, so more is
kept than on one GPU. The promise of `max_dropped_mass` holds for every rank's keys and so for all;
its accounts are a rank's own. ``threshold_scale_factor`` is refused, since λ = factor / kv_len
would be the shard's. `SkipStats` count what the rank itself did.

**Errors.** Ranks tell each other what they were asked before they begin; where they differ, or one
refuses its call, all raise an error that says which. If one does not answer within `timeout`
seconds, the others raise RuntimeError.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any

from .. import _check, _check_mla, _check_tools
from ..skip_softmax import SkipSoftmax
from ._engines import Form, Piece, Plans, engine_of
from ._rank_seeds import RankCache, shared_seeds

__all__ = ["ContextParallel", "visible_keys"]

_TIMEOUT = 60.0  # seconds
_PARTS = {"return_lse": True, "out_dtype": "float32"}  # what is merged


def visible_keys(seq_lens: Any, rank: Any, ranks: int, block: int) -> Any:
    """Return how many of a sequence's first keys a rank holds, blocks being dealt in turn.

    Key p belongs to rank ``p // block % ranks``, where it is number ``visible_keys(p, …)``.

    Parameters
    ----------
    seq_lens : int or array of int
        Keys, counted from the first. For token i of n it is ``seq_len - n + i + 1``.
    rank, ranks : int
        `rank` may be an array, such as `jax.lax.axis_index` gives.
    block : int
        Keys a block: the page size or a multiple of it; what a rank has room for makes contiguous
        ranges.

    Returns
    -------
    int or array

    Examples
    --------
    >>> from cuattn.interop.distributed import visible_keys
    >>> [visible_keys(100, rank, 3, 16) for rank in range(3)]
    [36, 32, 32]
    """
    turn = block * ranks
    rest = seq_lens % turn - rank * block
    rest = min(max(rest, 0), block) if isinstance(rest, int) else rest.clip(0, block)
    return seq_lens // turn * block + rest


class ContextParallel:
    """A rank's place in a group that holds the keys of the same requests between them.

    Parameters
    ----------
    group : process group, communicator or str
        Of `torch.distributed`; of `cupyx.distributed`, or anything with `rank`, `size` and
        ``all_gather(in, out, count)``; or the name of an axis of the mesh of `jax.shard_map`
        (with ``check_vma=False``), inside of which the methods are called.
    timeout : float or None
        Seconds to wait for other ranks in each exchange, on the host. None: nothing waits for a
        result, so decode with ``check=False`` can be captured in a CUDA graph; a lost rank then
        stops the stream, or does what the process group's own timeout says. Not for an axis of a
        mesh: XLA has its own.

    Raises
    ------
    TypeError
        If `group` is none of these.

    Examples
    --------
    >>> import torch                                                        # doctest: +SKIP
    >>> from cuattn.interop.distributed import ContextParallel             # doctest: +SKIP
    >>> torch.distributed.init_process_group("nccl")                       # doctest: +SKIP
    >>> group = ContextParallel(torch.distributed.group.WORLD)             # doctest: +SKIP
    >>> out = group.prefill(q, my_k, my_v, causal=True)                    # doctest: +SKIP
    """

    def __init__(self, group: Any, *, timeout: float | None = _TIMEOUT) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; wanted seconds above 0, or None")
        if isinstance(group, str) and timeout != _TIMEOUT:
            raise ValueError(f"timeout is {timeout!r} with an axis of a mesh; wanted XLA's flags")
        self._engine = engine_of(group, timeout)

    def prefill(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        scale: Any = None,
        out_scale: Any = None,
        soft_cap: float = 0.0,
        sinks: Any = None,
        skip_softmax: SkipSoftmax | None = None,
        return_lse: bool = False,
        out_dtype: Any = None,
    ) -> Any:
        """Attention over whole sequences whose keys lie on all ranks, lower ranks first.

        Parameters
        ----------
        q : array, ``[batch, q_len, q_heads, head_dim]``
            The same on all ranks.
        k, v : array, ``[batch, keys of this rank, kv_heads, head_dim]``
            With JAX every rank has as many.
        causal : bool
            Query i sees keys up to ``i + kv_len - q_len`` of all `kv_len`.
        scale, out_scale, soft_cap, sinks, skip_softmax, return_lse, out_dtype
            As in `cuattn.prefill`; no certificate, and see the module about skipping.

        Returns
        -------
        array, or a pair of them
            Output and, if asked for, LSE over the keys of all ranks: of PyTorch, CuPy or JAX.

        Raises
        ------
        ValueError, TypeError
            On all ranks, if arguments are wrong or differ.
        RuntimeError
            If a rank is lost.
        """
        options = {
            "scale": scale,
            "out_scale": out_scale,
            "soft_cap": soft_cap,
            "skip_softmax": skip_softmax,
        }
        common = {**options, "causal": causal, "sinks": sinks, "out_dtype": out_dtype}
        said = self._checked("prefill", {"q": q, "k": k, "v": v}, common)
        keys = self._agreed(said, k.shape[1])
        causal = _check.flag("causal", causal)
        plans = plans_of(q.shape[1], keys, causal, sinks is not None)

        def run(piece: Piece, functions: Any, **results: Any) -> Any:
            queries = q[:, piece.begin : piece.end]
            given = {**options, **_PARTS, **results, "sinks": sinks if piece.sinks else None}
            return functions.prefill(queries, k, v, causal=piece.causal, **given)

        form = Form((*q.shape[:-1], v.shape[-1]), said["out_dtype"], 1)
        out, lse = self._engine.merged(plans, run, form)
        return (out, lse) if return_lse else out

    def decode(
        self,
        q: Any,
        kv_cache: Any,
        block_tables: Any,
        seq_lens: Any,
        *,
        layout: str = "HND",
        scale: Any = None,
        out_scale: Any = None,
        soft_cap: float = 0.0,
        sinks: Any = None,
        skip_softmax: SkipSoftmax | None = None,
        batch_invariant: bool | None = None,
        return_lse: bool = False,
        out_dtype: Any = None,
        check: bool = True,
    ) -> Any:
        """Attention of the newest tokens over paged caches that hold the keys between them.

        Parameters
        ----------
        q : array, ``[batch, q_heads, head_dim]`` or ``[batch, q_len, q_heads, head_dim]``
            The same on all ranks.
        kv_cache, block_tables, layout
            This rank's cache and its pages, as in `cuattn.decode`.
        seq_lens : array, int32 ``[batch]`` or ``[batch, q_len]``
            How many keys of this rank each token sees, see `visible_keys`; may be 0. Several tokens
            of a request are run as requests of one token, since on a rank they may see any number.
        scale, out_scale, soft_cap, skip_softmax, batch_invariant, return_lse, out_dtype
            As in `cuattn.decode`; no certificate, and see the module about skipping.
        sinks : array, float32 ``[q_heads]``, optional
            Rank 0 applies them, so it must hold a key of each request that has any.
        check : bool
            Let the ranks compare what they were asked, which waits for all of them. False: for
            calls like one that was checked, in a CUDA graph or where the wait counts. On a mesh of
            JAX's there is one program, and nothing to compare.

        Returns
        -------
        array, or a pair of them
            As in `prefill`.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            As in `prefill`; with ``check=False`` a rank that differs is an error of the framework's
            or none.
        """
        scores = {"scale": scale, "soft_cap": soft_cap}
        fixed = {"layout": layout, "batch_invariant": batch_invariant}
        parts = _check.cache_parts(kv_cache)
        arrays = {"q": q, "kv_cache (k)": parts[0], "kv_cache (v)": parts[-1]}
        arrays |= {"block_tables": block_tables, "seq_lens": seq_lens}
        rest = {"out_scale": out_scale, "skip_softmax": skip_softmax, "sinks": sinks}
        common = {**scores, **fixed, **rest, "out_dtype": out_dtype}
        said = self._asked("decode", arrays, common, check)

        def call(functions: Any, rows: Any, tables: Any, lengths: Any, **options: Any) -> Any:
            return functions.decode(rows, kv_cache, tables, lengths, **fixed, **options)

        if scale is None:
            scores["scale"] = q.shape[-1] ** -0.5
        page_size = parts[0].shape[-2 if layout == "HND" else -3]
        cache = RankCache(call, page_size, parts[-1].shape[-1])
        requests = (q, block_tables, seq_lens)
        out, lse = self._decoded(cache, requests, scores, rest, said["out_dtype"])
        return (out, lse) if return_lse else out

    def mla_decode(
        self,
        q: Any,
        kv_cache: Any,
        block_tables: Any,
        seq_lens: Any,
        *,
        scale: Any,
        out_scale: Any = None,
        sinks: Any = None,
        skip_softmax: SkipSoftmax | None = None,
        latent_dim: int | None = None,
        batch_invariant: bool | None = None,
        return_lse: bool = False,
        out_dtype: Any = None,
        check: bool = True,
    ) -> Any:
        """Absorbed latent attention of the newest tokens, over paged caches as in `decode`.

        Parameters
        ----------
        q : array, ``[batch, heads, row]`` or ``[batch, q_len, heads, row]``
            The same on all ranks.
        kv_cache, block_tables
            This rank's cache and its pages, as in `cuattn.mla_decode`; no lists of chosen keys.
        scale, out_scale, skip_softmax, latent_dim, batch_invariant, return_lse, out_dtype
            As in `cuattn.mla_decode`; no certificate, and see the module about skipping.
        seq_lens, sinks, check
            As in `decode`.

        Returns
        -------
        array, or a pair of them
            As in `prefill`; the output is still in the latent space.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            As in `decode`.
        """
        fixed = {"latent_dim": latent_dim, "batch_invariant": batch_invariant}
        arrays = {"q": q, "kv_cache": kv_cache, "block_tables": block_tables, "seq_lens": seq_lens}
        rest = {"out_scale": out_scale, "skip_softmax": skip_softmax, "sinks": sinks}
        common = {**fixed, **rest, "scale": scale, "out_dtype": out_dtype}
        said = self._asked("mla_decode", arrays, common, check)

        def call(functions: Any, rows: Any, tables: Any, lengths: Any, **options: Any) -> Any:
            return functions.mla_decode(rows, kv_cache, tables, lengths, **fixed, **options)

        form = _check_tools.mla_cache(self._engine.view(kv_cache, "kv_cache")).shape
        latent = _check_mla.latent_dim(latent_dim) or _check_mla.latent_of(form[3])
        cache = RankCache(call, form[2], latent)
        requests = (q, block_tables, seq_lens)
        out, lse = self._decoded(cache, requests, {"scale": scale}, rest, said["out_dtype"])
        return (out, lse) if return_lse else out

    def _decoded(
        self,
        cache: RankCache,
        requests: tuple[Any, Any, Any],
        scores: dict[str, Any],
        rest: dict[str, Any],
        out_dtype: str,
    ) -> tuple[Any, Any]:
        """Return output and LSE over the pages of all ranks.

        `requests` are q, tables and lengths, `scores` options in units of scores, `rest` the others
        that say what becomes of them.
        """
        q, sinks = requests[0], rest["sinks"]
        rows, tables, lengths, skip = self._rows(*requests, rest["skip_softmax"])
        if skip is not None and skip.threshold is not None:
            seeds = shared_seeds(self._engine, cache, (rows, tables, lengths), scores)
            skip = replace(skip, seeds=seeds)

        def run(piece: Piece, functions: Any, **results: Any) -> Any:
            own = {"skip_softmax": skip, "sinks": sinks if piece.sinks else None}
            given = {**scores, **rest, **own, **_PARTS, **results}
            return cache.call(functions, rows, tables, lengths, **given)

        ranks = range(self._engine.ranks())
        plans = [(Piece(0, rows.shape[0], False, sinks is not None and r == 0),) for r in ranks]
        form = Form((*rows.shape[:-1], cache.columns), out_dtype, 0)
        out, lse = self._engine.merged(plans, run, form)
        if len(q.shape) == 4:
            out, lse = out.reshape(*q.shape[:-1], cache.columns), lse.reshape(q.shape[:-1])
        return out, lse

    def _rows(
        self, q: Any, tables: Any, lengths: Any, skip: SkipSoftmax | None
    ) -> tuple[Any, Any, Any, SkipSoftmax | None]:
        """Return every token as a request of its own, if a request has several."""
        if len(q.shape) == 3:
            return q, tables, lengths, skip
        batch, times = q.shape[:2]
        if skip is not None and len(getattr(skip.threshold, "shape", ())):
            skip = replace(skip, threshold=self._engine.repeat(skip.threshold, times))
        rows = q.reshape(batch * times, *q.shape[2:])
        return rows, self._engine.repeat(tables, times), lengths.reshape(batch * times), skip

    def _agreed(self, said: dict[str, Any], keys: int) -> list[int]:
        """Compare what all ranks say of their calls; return how many keys each has."""
        everyone = self._engine.agree({**said, "keys": keys})
        for rank, other in enumerate(everyone):
            if "refused" in other:
                raise ValueError(f"rank {rank} refused its call: {other['refused']}")
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if name != "keys" and other.get(name) != value:
                    raise ValueError(
                        f"rank {rank} has {name} {other.get(name)}; wanted rank 0's {value}"
                    )
        return [other["keys"] for other in everyone]

    def _described(
        self, call: str, arrays: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what ranks must have in common, or raise."""
        _refuse(options["skip_softmax"])
        self._engine.work_like(arrays["q"])
        said: dict[str, Any] = {"call": call}
        for name, x in arrays.items():
            view = self._engine.view(x, name)
            if name == "block_tables":
                if len(view.shape) != 2:
                    raise ValueError(f"{name} has shape {view.shape}; wanted [batch, max_pages]")
                continue  # ranks may have room for more or fewer pages
            queries = tuple(arrays["q"].shape[:-2])
            if name == "seq_lens" and view.shape != queries:
                raise ValueError(f"seq_lens has shape {view.shape}; wanted q's {queries}")
            if name != "seq_lens" and len(view.shape) < 3:
                raise ValueError(f"{name} has shape {view.shape}; wanted at least 3 axes")
            # Of keys and values what ranks share: all but how many there are.
            shape = view.shape if name in ("q", "seq_lens") else view.shape[-2:]
            said[name] = [*shape, view.dtype]
        said |= {name: _words(value) for name, value in options.items()}
        said["out_dtype"] = _check.dtype_name(options["out_dtype"]) or said["q"][-1]
        return said

    def _asked(
        self, call: str, arrays: dict[str, Any], options: dict[str, Any], check: Any
    ) -> dict[str, Any]:
        """Return a decode call's description, compared with that of other ranks or not."""
        if not _check.flag("check", check):
            return self._described(call, arrays, options)
        said = self._checked(call, arrays, options)
        self._agreed(said, 0)
        return said

    def _checked(
        self, call: str, arrays: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a call's description; tell the other ranks if there is none."""
        try:
            return self._described(call, arrays, options)
        except (TypeError, ValueError) as error:
            self._engine.agree({"refused": str(error)})
            raise


def plans_of(q_len: int, keys: list[int], causal: bool, sinks: bool) -> Plans:
    """Return which queries see all keys of a rank and which a beginning of them, of every rank.

    With d keys behind a rank's, its last d queries see all of them, and the others are what causal
    means when they are alone. Sinks go to the rank that holds the first key.
    """
    first = next((rank for rank, count in enumerate(keys) if count), 0)
    plans = []
    for rank in range(len(keys)):
        own = sinks and rank == first
        cut = q_len - min(sum(keys[rank + 1 :]), q_len) if causal else 0
        pieces = (Piece(0, cut, True, own), Piece(cut, q_len, False, own))
        plans.append(tuple(piece for piece in pieces if piece.begin < piece.end) or pieces[1:])
    return plans


def _refuse(skip: Any) -> None:
    """Raise for what of a SkipSoftmax has no meaning on a part of the keys."""
    if skip is None:
        return
    if not isinstance(skip, SkipSoftmax):
        raise TypeError(f"skip_softmax is a {type(skip).__name__}; wanted a SkipSoftmax")
    if skip.seeds is not None:
        raise ValueError("skip_softmax has seeds, which ranks find out together; wanted None")
    if skip.threshold_scale_factor:
        raise ValueError(
            f"skip_softmax has threshold_scale_factor={skip.threshold_scale_factor!r}, which would "
            "be divided by a rank's number of keys; wanted threshold=factor / kv_len"
        )
    if skip.certificate:
        raise ValueError(
            "skip_softmax has certificate=True, which would speak of a rank's keys; wanted False"
        )


def _words(value: Any) -> Any:
    """Return an option as JSON has it: numbers and words; of arrays that they are some."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, SkipSoftmax):
        return [_words(value.threshold), value.max_dropped_mass, value.unsafe]
    return float(value) if isinstance(value, Real) else "array"

"""Context parallelism: every rank attends to its part of the keys, and the parts are merged.

All ranks have the same queries and get the same result. A rank's outputs and log-sum-exps (float32)
go to all others in one exchange, and `cuattn.merge_states` merges them. One class serves three
frameworks, by what it is given:

- ``ContextParallel(torch.distributed.group.WORLD)``: PyTorch's tensors, over NCCL or gloo
- ``ContextParallel(cupyx.distributed.init_process_group(…))``: any CUDA arrays, over NCCL
- ``ContextParallel("ranks")``: JAX's arrays, inside `jax.shard_map` over the axis of that name

**Who holds what.** In `prefill` rank 0 holds the first keys, rank 1 those behind, and so on; ranks
may hold unequal numbers, or none. In `decode` blocks of keys are dealt to the ranks in turn, and
`visible_keys` says how many each holds; one block a rank is a contiguous range. In both a rank's
keys are in their order, so what a causal query sees of them is a beginning.

**Skipping.** A rank judges tiles by its own keys: the running maximum and, in decode, the seeds are
of its shard, and seeds are kept. Nothing of it is shared between ranks, so more tiles are kept than
on one GPU: by the reference, of structured heads with 128K keys at 1 % left out, 96 % are
skipped on one GPU, 94 % on two ranks; on eight 92 % with contiguous ranges and 76 % with blocks of
64 keys in turn. The promise of `max_dropped_mass` holds all the same. ``threshold_scale_factor`` is
refused, since λ = factor / kv_len would be the shard's. `SkipStats` count what the rank itself did.

**Errors.** Ranks tell each other what they were asked before they begin; where they differ, or one
refuses its call, all raise an error that says which. If one does not answer within `timeout`
seconds, the others raise RuntimeError.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any

from .. import _check
from ..skip_softmax import SkipSoftmax
from ._engines import Form, Piece, Plans, engine_of

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
        options = {
            "layout": layout,
            "scale": scale,
            "out_scale": out_scale,
            "soft_cap": soft_cap,
            "skip_softmax": skip_softmax,
            "batch_invariant": batch_invariant,
        }
        parts = _check.cache_parts(kv_cache)
        arrays = {"q": q, "kv_cache (k)": parts[0], "kv_cache (v)": parts[-1]}
        common = {**options, "sinks": sinks, "out_dtype": out_dtype}
        arrays["seq_lens"] = seq_lens
        if _check.flag("check", check):
            said = self._checked("decode", arrays, common)
            self._agreed(said, 0)
        else:
            said = self._described("decode", arrays, common)
        rows, tables, lengths, skip = self._rows(q, block_tables, seq_lens, skip_softmax)
        options["skip_softmax"] = skip

        def run(piece: Piece, functions: Any, **results: Any) -> Any:
            given = {**options, **_PARTS, **results, "sinks": sinks if piece.sinks else None}
            return functions.decode(rows, kv_cache, tables, lengths, **given)

        ranks = range(self._engine.ranks())
        plans = [(Piece(0, rows.shape[0], False, sinks is not None and r == 0),) for r in ranks]
        form = Form((*rows.shape[:-1], parts[-1].shape[-1]), said["out_dtype"], 0)
        out, lse = self._engine.merged(plans, run, form)
        if len(q.shape) == 4:
            out, lse = out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])
        return (out, lse) if return_lse else out

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
    if not isinstance(skip, SkipSoftmax):
        return  # None, or refused by the call
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

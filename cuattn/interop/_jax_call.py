"""One call under JAX: shapes come from the checks while it is traced, the launch when XLA runs it.

trace    operands → views without memory → checks → shapes of the results → `buffer_callback`
run      XLA's buffers → CuPy arrays on XLA's stream, or NumPy arrays → the function of cuattn
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.buffer_callback import buffer_callback

import cuattn

from .. import _check, _ingest, _launch
from .._layout import normalised, token_of
from .._records import HOST, View
from ..skip_softmax import PLANES, SkipSoftmax, SkipStats

Operands = dict[str, Any]  # arrays, sequences of arrays and None, by the names of arguments

LIVE = ("threshold", "seeds")  # parts of a SkipSoftmax that may be operands
_WORDS = 2  # of 32 bits, in a counter: JAX has no 64 unless it is told to

# Results that are made beside XLA's and copied, in a graph: its capture cannot tell how long
# replays go on, so they stay.
_captured: list[Any] = []


@dataclass(frozen=True)
class Result:
    """What a call returns, and by which argument it is written."""

    argument: str  # "out", "lse", "lost", "counts" or "kv_cache"
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """All that is known of a call while it is traced, and what XLA calls when it runs.

    Two calls that are equal are one to JAX, which then compiles only once outside of `jax.jit`.
    """

    function: str  # of cuattn
    options: tuple[tuple[str, Any], ...]
    results: tuple[Result, ...]
    skip: SkipSoftmax | None = None  # of what is an operand it has a mark
    tree: Any = None  # structure of the operands

    def __call__(self, context: Any, results: Sequence[Any], *buffers: Any) -> None:
        """Run the call on XLA's buffers."""
        with _arrays(context, [*results, *buffers]) as (arrays, stream):
            names = [result.argument for result in self.results]
            written = arrays[: len(results)]
            made = dict(zip(names, written, strict=True))
            arguments = jax.tree.unflatten(self.tree, arrays[len(results) :])
            arguments |= self.options
            live = {name: arguments.pop(name) for name in LIVE if name in arguments}
            counts = arguments.pop("counts", None)
            if "kv_cache" in made:  # written in place: XLA gave both the same memory
                arguments["kv_cache"] = written[0] if len(written) == 1 else tuple(written)
            else:
                arguments |= {name: made[name] for name in ("out", "lse") if name in made}
            if self.skip is not None:
                stats = None if counts is None else _Into(made["counts"])
                arguments["skip_softmax"] = replace(self.skip, **live, stats=stats)
            returned = getattr(cuattn, self.function)(**arguments)
            if "lost" in made:
                made["lost"][...] = returned[-1]
                if stream and _launch.capturing(stream):
                    _captured.append(returned[-1])


class _Into(SkipStats):
    """Counters in memory of XLA's, ``[plane, batch, head, word]``."""

    def __init__(self, words: Any) -> None:
        super().__init__()
        self._counts = words.view(np.uint64)[..., 0]

    def counts(self, batch: int, heads: int, device: int) -> Any:
        return self._counts


@contextmanager
def _arrays(context: Any, buffers: Sequence[Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield buffers as arrays, CuPy's on XLA's stream or NumPy's, and the stream's handle."""
    kind, device = buffers[0].__dlpack_device__()
    if kind == 1:  # kDLCPU
        yield [np.asarray(buffer) for buffer in buffers], 0
        return
    import cupy

    stream = _Stream(int(context.stream))
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(stream):
        yield [cupy_array(buffer, stream.handle) for buffer in buffers], stream.handle


def cupy_array(buffer: Any, stream: int) -> Any:
    """Return the CuPy array over a buffer's memory, which XLA keeps until its stream is through."""
    import cupy

    view = _ingest.view(buffer, "buffer", stream)
    dtype = jnp.dtype(view.dtype)
    size = int(np.prod(view.shape)) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(view.pointer, size, None, max(view.device, 0))
    return cupy.ndarray(view.shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


class _Stream:
    """A stream's handle, as CuPy takes it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


# --- while a call is traced ----------------------------------------------------------------------


def operand(x: Any, name: str) -> Any:
    """Return a JAX array, or raise TypeError naming the argument."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    raise TypeError(f"{name} is a {type(x).__name__}; wanted a JAX array")


def cache_operands(kv_cache: Any) -> Any:
    """Return one array, or the pair of keys and values."""
    parts = _check.cache_parts(kv_cache)
    if len(parts) == 1:
        return operand(parts[0], "kv_cache")
    names = ("kv_cache (k)", "kv_cache (v)")
    return tuple(operand(part, name) for part, name in zip(parts, names, strict=True))


def view(x: Any) -> View:
    """Return the view of an array that has no memory yet; XLA's will be packed and aligned."""
    shape, dtype = tuple(x.shape), x.dtype.name
    strides = normalised(shape, None)
    token = token_of(shape, strides, dtype, HOST)
    return View(0, shape, strides, dtype, HOST, None, False, None, token)


def bind(
    call: Call,
    operands: Operands,
    again: Callable[[Operands], tuple[Any, ...]],
    requests: frozenset[str] = frozenset(),
) -> tuple[Any, ...]:
    """Return the results of a call as JAX sees them.

    Parameters
    ----------
    call : Call
    operands : dict
    again : callable
        Checks and binds the same call with other operands.
    requests : set of str
        Operands whose first axis counts requests, so that `jax.vmap` may put its own in front of
        it. Where another one is mapped, calls run one after the other.
    """
    leaves, tree = jax.tree.flatten(operands)
    call = replace(call, tree=tree)
    folds = _leaf_flags(operands, requests)
    written = _leaf_flags(operands, {"kv_cache"} & {result.argument for result in call.results})

    @custom_vmap
    def run(*leaves: Any) -> tuple[Any, ...]:
        return _called(call, leaves, written)

    @run.def_vmap
    def mapped(size: int, is_mapped: Sequence[bool], *leaves: Any) -> Any:
        if all(fold or not m for fold, m in zip(folds, is_mapped, strict=True)):
            chosen = zip(leaves, folds, is_mapped, strict=True)
            folded = [_folded(x, size, m) if fold else x for x, fold, m in chosen]
            results = again(jax.tree.unflatten(tree, folded))
            results = tuple(
                _unfolded(x, size, 1 if result.argument == "counts" else 0)
                for x, result in zip(results, call.results, strict=True)
            )
        else:
            results = _one_by_one(run, leaves, is_mapped)
        return results, (True,) * len(results)

    @jax.custom_jvp
    def inference(*leaves: Any) -> tuple[Any, ...]:
        made: tuple[Any, ...] = run(*leaves)
        return made

    @inference.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"cuattn.interop.jax.{call.function} has no gradient, since it is for inference; "
            "wanted jax.lax.stop_gradient around its arguments, or another attention"
        )

    results: tuple[Any, ...] = inference(*leaves)
    return results


def _leaf_flags(operands: Operands, chosen: frozenset[str] | set[str]) -> list[bool]:
    """Say of every array whether it belongs to one of the chosen operands."""
    flags = {
        name: jax.tree.map(lambda _, name=name: name in chosen, part)
        for name, part in operands.items()
    }
    return jax.tree.leaves(flags)


def _called(call: Call, leaves: Sequence[Any], written: Sequence[bool]) -> tuple[Any, ...]:
    """Let XLA call back; counters start at 0 and come back as their low words."""
    arguments = [result.argument for result in call.results]
    places = [place for place, into in enumerate(written) if into]
    aliases = {place: result for result, place in enumerate(places)}
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for x in call.results]
    if "counts" in arguments:
        place = arguments.index("counts")
        operands = jax.tree.unflatten(call.tree, leaves)
        operands["counts"] = jnp.zeros(shapes[place].shape, np.uint32)
        aliases = {_leaf_flags(operands, {"counts"}).index(True): place}
        leaves, tree = jax.tree.flatten(operands)
        call = replace(call, tree=tree)
    results = buffer_callback(
        call, shapes, input_output_aliases=aliases, command_buffer_compatible=True
    )(*leaves)
    return tuple(
        x[..., 0] if name == "counts" else x for x, name in zip(results, arguments, strict=True)
    )


def _folded(x: Any, size: int, is_mapped: bool) -> Any:
    """Put a mapped axis in front of the requests, into their axis."""
    every = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
    return every.reshape(size * every.shape[1], *every.shape[2:])


def _unfolded(x: Any, size: int, axis: int) -> Any:
    """Take it out again, to the front."""
    parts = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(parts, axis, 0)


def _one_by_one(run: Any, leaves: Sequence[Any], is_mapped: Sequence[bool]) -> tuple[Any, ...]:
    """Run a call for each index of a mapped axis."""

    def one(chosen: list[Any]) -> tuple[Any, ...]:
        rest = iter(chosen)
        made: tuple[Any, ...] = run(
            *[next(rest) if m else x for x, m in zip(leaves, is_mapped, strict=True)]
        )
        return made

    picked = [x for x, m in zip(leaves, is_mapped, strict=True) if m]
    results: tuple[Any, ...] = jax.lax.map(one, picked)
    return results


def counts_result(batch: int, heads: int) -> Result:
    """Counters of votes: visited, skipped and ineligible."""
    return Result("counts", (len(PLANES), batch, heads, _WORDS), "uint32")

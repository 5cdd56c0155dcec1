"""How the ranks of `distributed` meet: PyTorch's process groups, NCCL from CuPy, JAX's mesh axes.

An engine runs a rank's calls into one packed float32 array, [outputs | log-sum-exps], so that all
ranks exchange their parts in one step.  JAX's gathers the two arrays and leaves packing to XLA.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np

import cuattn

from .. import _ingest, _launch
from .._records import HOST, View

DESCRIPTION = 2048  # bytes of what ranks tell each other of a call
_POLL = 50e-6  # seconds


class Piece(NamedTuple):
    """Some of the queries, from `begin` up to `end`, against all keys of a rank."""

    begin: int
    end: int
    causal: bool
    sinks: bool


Plans = Sequence[tuple[Piece, ...]]  # of every rank
Run = Callable[..., Any]  # (piece, functions, **results) → what the function returns


class Engine(Protocol):
    """What `ContextParallel` needs of a framework."""

    def ranks(self) -> int:
        """Return how many there are."""

    def view(self, x: Any, name: str) -> View:
        """Return an array's view."""

    def work_like(self, q: Any) -> None:
        """Make arrays where `q` is from now on."""

    def repeat(self, x: Any, times: int) -> Any:
        """Return an array with every row so many times."""

    def array(self, x: Any) -> Any:
        """Return an array that the framework calculates with."""

    def columns(self, x: Any, chosen: Callable[[Any], Any], count: int) -> Any:
        """Return those columns of each row that ``chosen(arange(count))`` says, by row."""

    def largest(self, run: Callable[..., Any], shape: tuple[int, ...]) -> Any:
        """Run a call whose output has this shape; return the largest LSE of any rank, row by row.

        `run` takes the functions and where results go, and returns what the function returns.
        """

    def agree(self, description: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what every rank says of its call."""

    def merged(self, plans: Plans, run: Run, form: Form) -> tuple[Any, Any]:
        """Run this rank's pieces and return output and LSE over the keys of all ranks."""


class Form(NamedTuple):
    """The result of a call: the output's shape and dtype, and the axis that pieces cut."""

    shape: tuple[int, ...]
    dtype: str
    axis: int


def engine_of(group: Any, timeout: float | None) -> Engine:
    """Return the engine for a communicator, or raise TypeError."""
    if isinstance(group, str):
        return _Jax(group)
    module = type(group).__module__.split(".")[0]
    if module == "torch":
        return _Torch(group, timeout)
    if hasattr(group, "all_gather") and hasattr(group, "rank"):
        return _Nccl(group, timeout)
    raise TypeError(
        f"group is a {type(group).__name__}; wanted a process group of torch.distributed, a "
        "communicator of cupyx.distributed, or the name of an axis of jax.shard_map"
    )


class _Packed(ABC):
    """What the engines of PyTorch and CuPy share."""

    rank: int
    size: int

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._lost = ""

    def ranks(self) -> int:
        return self.size

    def view(self, x: Any, name: str) -> View:
        return _ingest.view(x, name)

    def agree(self, description: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(description).encode()
        if len(text) > DESCRIPTION:
            raise ValueError(f"the call is described by {len(text)} bytes; wanted {DESCRIPTION}")
        mine = np.frombuffer(text.ljust(DESCRIPTION), np.uint8)
        self._check_alive()
        everyone = self._gather_bytes(mine)
        return [json.loads(bytes(row)) for row in everyone]

    def merged(self, plans: Plans, run: Run, form: Form) -> tuple[Any, Any]:
        self._check_alive()
        rows = math.prod(form.shape[:-1])
        count = rows * form.shape[-1] + -(-rows // 4) * 4  # parts start on 16 bytes
        packed = self._empty((1, count), "float32")
        outs, lses = _views_of(packed, form.shape)
        for piece in plans[self.rank]:
            chosen = (0, *[slice(None)] * form.axis, slice(piece.begin, piece.end))
            lse = self._empty(tuple(lses[chosen].shape), "float32")
            run(piece, cuattn, out=outs[chosen], lse=lse)
            lses[chosen] = lse
        everyone = self._empty((self.size, count), "float32")
        self._gather(packed, everyone)
        out = self._empty(form.shape, form.dtype)
        lse = self._empty(form.shape[:-1], "float32")
        return cuattn.merge_states(
            *_views_of(everyone, form.shape), out=out, lse=lse, out_dtype=form.dtype
        )

    def largest(self, run: Callable[..., Any], shape: tuple[int, ...]) -> Any:
        self._check_alive()
        rows = shape[:-1]
        count = math.prod(rows)
        lse = self._empty(rows, "float32")
        run(cuattn, out=self._empty(shape, "float32"), lse=lse)
        everyone = self._empty((self.size, count), "float32")
        self._gather(lse.reshape(1, count), everyone)
        return self._maxima(everyone).reshape(rows)

    def _check_alive(self) -> None:
        if self._lost:
            raise RuntimeError(f"{self._lost}; wanted a new group, since this one is of no use")

    def _lose(self, reason: str) -> RuntimeError:
        """Remember that ranks are out of step for good; return what to raise."""
        self._lost = (
            f"rank {self.rank} of {self.size} has no answer from all others ({reason}): one is "
            "lost, or in another call"
        )
        return RuntimeError(self._lost)

    @abstractmethod
    def _gather_bytes(self, mine: np.ndarray) -> np.ndarray:
        """Return the bytes of every rank, ``[rank, byte]``."""

    @abstractmethod
    def _gather(self, mine: Any, everyone: Any) -> None:
        """Write what every rank has into `everyone`, ``[rank, …]``."""

    @abstractmethod
    def _maxima(self, x: Any) -> Any:
        """Return the largest of each column."""

    @abstractmethod
    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of the framework's, whose values are not set."""


def _views_of(packed: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return outputs ``[ranks, *shape]`` and log-sum-exps of packed rows ``[ranks, count]``."""
    ranks, rows = packed.shape[0], math.prod(shape[:-1])
    numbers = rows * shape[-1]
    outs, lses = packed[:, :numbers], packed[:, numbers : numbers + rows]
    return outs.reshape(ranks, *shape), lses.reshape(ranks, *shape[:-1])


class _Torch(_Packed):
    """A process group of `torch.distributed`, NCCL's or gloo's; tensors in and out."""

    def __init__(self, group: Any, timeout: float | None) -> None:
        import torch

        super().__init__(timeout)
        self._group = group
        self._torch = torch
        self.rank, self.size = group.rank(), group.size()
        self._device = torch.device("cpu")

    def work_like(self, q: Any) -> None:
        if not isinstance(q, self._torch.Tensor):
            raise TypeError(f"q is a {type(q).__name__}; wanted a torch.Tensor, as its group is")
        self._device = q.device

    def repeat(self, x: Any, times: int) -> Any:
        return self._torch.repeat_interleave(x, times, dim=0)

    def array(self, x: Any) -> Any:
        return x

    def columns(self, x: Any, chosen: Callable[[Any], Any], count: int) -> Any:
        places = chosen(self._torch.arange(count, device=self._device))
        return self._torch.take_along_dim(x, places, dim=1)

    def _maxima(self, x: Any) -> Any:
        return self._torch.amax(x, dim=0)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self._device)

    def _gather_bytes(self, mine: np.ndarray) -> np.ndarray:
        everyone = self._empty((self.size, mine.size), "uint8")
        self._gather(self._torch.tensor(mine, device=self._device)[None], everyone)
        host: np.ndarray = everyone.cpu().numpy()
        return host

    def _gather(self, mine: Any, everyone: Any) -> None:
        from torch import distributed

        gather = getattr(distributed, "all_gather_single", None)  # its name from 2.13 on
        gather = gather or distributed.all_gather_into_tensor
        try:
            work = gather(everyone, mine, group=self._group, async_op=True)
            if self.timeout is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._lose(str(error).splitlines()[0]) from error


class _Nccl(_Packed):
    """A communicator of `cupyx.distributed`, or anything with its `rank` and `all_gather`."""

    def __init__(self, group: Any, timeout: float | None) -> None:
        super().__init__(timeout)
        self._group = group
        self.rank = group.rank
        self.size = group.size if hasattr(group, "size") else group._n_devices
        self._xp: Any = np

    def work_like(self, q: Any) -> None:
        if _ingest.view(q, "q").device != HOST:
            import cupy

            self._xp = cupy

    def repeat(self, x: Any, times: int) -> Any:
        return self._xp.repeat(self.array(x), times, axis=0)

    def array(self, x: Any) -> Any:
        return x if isinstance(x, self._xp.ndarray) else self._xp.from_dlpack(x)

    def columns(self, x: Any, chosen: Callable[[Any], Any], count: int) -> Any:
        places = chosen(self._xp.arange(count))
        return self._xp.take_along_axis(self.array(x), places, axis=1)

    def _maxima(self, x: Any) -> Any:
        return x.max(axis=0)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._xp.empty(shape, np.dtype(dtype))

    def _gather_bytes(self, mine: np.ndarray) -> np.ndarray:
        everyone = self._empty((self.size, mine.size), "uint8")
        self._gather(self._xp.asarray(mine), everyone)
        return everyone if self._xp is np else everyone.get()

    def _gather(self, mine: Any, everyone: Any) -> None:
        self._group.all_gather(mine, everyone, mine.size)
        if self._xp is np or self.timeout is None:
            return
        stream = self._xp.cuda.get_current_stream()
        if stream.ptr and _launch.capturing(stream.ptr):
            return
        self._wait(stream.record(), self.timeout)

    def _wait(self, event: Any, timeout: float) -> None:
        """Wait for NCCL as long as it may take; then give it up, since it never would."""
        communicator = getattr(self._group, "_comm", None)
        deadline = time.monotonic() + timeout
        while not event.done:
            if time.monotonic() > deadline:
                if communicator is not None:
                    communicator.abort()
                raise self._lose(f"waited {timeout} s")
            time.sleep(_POLL)


class _Jax:
    """An axis of the mesh of `jax.shard_map`; its program is the same for every rank."""

    def __init__(self, axis: str) -> None:
        self._axis = axis

    def ranks(self) -> int:
        import jax

        return int(jax.lax.axis_size(self._axis))

    def view(self, x: Any, name: str) -> View:
        from . import _jax_call

        return _jax_call.view(_jax_call.operand(x, name))

    def work_like(self, q: Any) -> None:
        """XLA knows."""

    def repeat(self, x: Any, times: int) -> Any:
        import jax.numpy as jnp

        return jnp.repeat(x, times, axis=0)

    def array(self, x: Any) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(x)

    def columns(self, x: Any, chosen: Callable[[Any], Any], count: int) -> Any:
        import jax.numpy as jnp

        return jnp.take_along_axis(jnp.asarray(x), chosen(jnp.arange(count)), axis=1)

    def largest(self, run: Callable[..., Any], shape: tuple[int, ...]) -> Any:
        import jax

        from . import jax as functions

        _, lse = run(functions)
        return jax.lax.pmax(lse, self._axis)

    def agree(self, description: dict[str, Any]) -> list[dict[str, Any]]:
        return [description] * self.ranks()

    def merged(self, plans: Plans, run: Run, form: Form) -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        from . import jax as functions

        def parts(plan: tuple[Piece, ...]) -> tuple[Any, Any]:
            outs, lses = zip(*[run(piece, functions) for piece in plan], strict=True)
            return jnp.concatenate(outs, form.axis), jnp.concatenate(lses, form.axis)

        distinct = list(dict.fromkeys(plans))
        if len(distinct) == 1:
            mine = parts(distinct[0])
        else:
            branches = [lambda plan=plan: parts(plan) for plan in distinct]
            chosen = jnp.array([distinct.index(plan) for plan in plans])
            mine = jax.lax.switch(chosen[jax.lax.axis_index(self._axis)], branches)
        everyone = [jax.lax.all_gather(x, self._axis) for x in mine]
        return functions.merge_states(*everyone, out_dtype=form.dtype)

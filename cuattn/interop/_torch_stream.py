"""Calls of ours on PyTorch's current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

_stay = nullcontext()


def torch_stream(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one, and PyTorch's current stream CuPy's.

    So a call neither waits for another stream nor lets one wait, and all it does can be captured
    by `torch.cuda.graph`.
    """
    if not x.is_cuda:  # for the emulator, or to be refused
        return _stay
    import cupy

    if x.device.index != torch.cuda.current_device():
        return _on_its_device(x)
    handle = torch.cuda.current_stream().cuda_stream
    if handle == cupy.cuda.get_current_stream().ptr:
        return _stay
    stream: AbstractContextManager[Any] = _stream(handle)
    return stream


@contextmanager
def _on_its_device(x: torch.Tensor) -> Iterator[None]:
    with torch.cuda.device(x.device), torch_stream(x):
        yield


class _Handle:
    """A stream of PyTorch for CuPy."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_Handle(handle))

"""One conformance case: a kernel, its inputs, and how exactly its results are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn import _sources

Array = NDArray[Any]


class Numbers:
    """Random numbers that are the same with every version of NumPy: SplitMix64."""

    def __init__(self, seed: int) -> None:
        self._seed = seed << 32

    def words(self, *shape: int) -> Array:
        """Words of 64 bits."""
        count = int(np.prod(shape))
        z = np.arange(self._seed, self._seed + count, dtype=np.uint64)
        self._seed += count
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).reshape(shape)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Array:
        """Numbers from `low` to below `high`."""
        return (self.words(*shape) % np.uint64(high - low)).astype(np.int64) + low

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Array:
        """Numbers between `low` and `high`."""
        return low + (high - low) * (self.words(*shape) >> np.uint64(11)) / 2.0**53

    def permutation(self, count: int) -> Array:
        """The numbers below `count` in any order."""
        return np.argsort(self.words(count)).astype(np.int32)


@dataclass(frozen=True)
class Map:
    """A tensor map of one of the buffers: its box, innermost axis first, and swizzle."""

    buffer: str
    box: tuple[int, ...]
    swizzle: int = 0


@dataclass(frozen=True)
class Case:
    """A kernel named `conformance` on given inputs.

    Its one parameter is a struct: the tensor maps, then pointers to inputs and to results.
    """

    family: str  # the fixture's file
    name: str
    wrappers: str  # functions of kernels/ptx/ that this is the proof of, with spaces between
    source: str
    inputs: Mapping[str, Array]
    results: Mapping[str, Array]  # as they are before the launch
    config: str = ".unused = 0"
    threads: int = 32
    maps: tuple[Map, ...] = ()
    # Results that are not exact on a GPU: name → (relative, absolute), or one absolute a plane.
    tolerances: Mapping[str, tuple[float, float | tuple[float, ...]]] = field(default_factory=dict)
    expected: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None  # by NumPy

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def sources(self) -> dict[str, str]:
        """The library's headers and this kernel."""
        return {**_sources.read(), "conformance.cu": self.source}

    def digest(self) -> str:
        """Hash of the inputs: what a GPU gave belongs to them and to no others."""
        total = hashlib.sha256(self.config.encode())
        for name, array in self.inputs.items():
            total.update(f"{name} {array.shape} {array.dtype}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()[:32]

    def params(self, maps: list[bytes], pointers: list[int]) -> bytes:
        """The parameter struct; a tensor map makes its size a multiple of 64."""
        packed = b"".join([*maps, np.array(pointers, np.uint64).tobytes()])
        return packed + bytes(-len(packed) % 64 if maps else 0)


def compare(case: Case, actual: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Demand equal bits, or the stated tolerance with NaN and infinities in the same places."""
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{case}: {name} has shape {got.shape}, not {want.shape}"
        if name in case.tolerances:
            relative, absolute = case.tolerances[name]
            planes = absolute if isinstance(absolute, tuple) else (absolute,)
            with np.errstate(invalid="ignore", over="ignore"):
                pairs = [x.astype(np.float64).reshape(len(planes), -1) for x in (got, want)]
            for one, other, most in zip(*pairs, planes, strict=True):
                np.testing.assert_allclose(one, other, relative, most, err_msg=f"{case}: {name}")
            continue
        words = f"u{got.dtype.itemsize}"
        np.testing.assert_array_equal(got.view(words), want.view(words), f"{case}: {name}")

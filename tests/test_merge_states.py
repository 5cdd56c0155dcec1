"""merge_states against float64, with parts that count for nothing and parts without end."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import DTYPES, batched
from cases import Case as Attention
from compare import assert_close, assert_same_bits, bits
from numpy.typing import NDArray

import cuattn
from cuattn import emulator
from cuattn._tool_params import MOST_PARTS

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call, in words."""

    parts: int = 3
    shape: tuple[int, ...] = (9, 4)  # of a part's LSE
    dim: int = 64
    dtype: str = "bfloat16"
    out_dtype: str | None = None
    stacked: bool = False
    padded: bool = True  # outs and lses, and out and lse, are cut out of larger arrays
    spread: float = 3.0  # of the LSEs
    empty: float = 0.0  # share of rows whose LSE is −∞, and whose output is NaN

    @property
    def id(self) -> str:
        words = {
            f"{self.parts}parts": True,
            "x".join(map(str, self.shape)): self.shape != (9, 4),
            f"d{self.dim}": self.dim != 64,
            self.dtype: True,
            f"to-{self.out_dtype}": self.out_dtype,
            "stacked": self.stacked,
            "packed": not self.padded,
            f"spread{self.spread:g}": self.spread != 3,
            f"{self.empty:.0%}empty": self.empty,
        }
        return "-".join(word for word, said in words.items() if said)

    def __str__(self) -> str:
        return self.id


def merged(outs: Array, lses: Array, dtype: Any) -> tuple[Array, Array]:
    """Merge stacked parts in the arithmetic of `dtype`."""
    lses = lses.astype(dtype)
    seen = np.isfinite(lses)
    maximum = np.where(seen, lses, -np.inf).max(0)
    reference = np.where(np.isfinite(maximum), maximum, 0)
    weights = np.exp(lses - reference).astype(dtype)
    values = np.where(seen[..., None], outs.astype(dtype), 0)
    total = weights.sum(0, dtype=dtype)
    whole = (weights[..., None] * values).sum(0, dtype=dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total[..., None] > 0, whole / total[..., None], 0)
        return out.astype(dtype), (reference + np.log(total)).astype(dtype)


class Call:
    """Stacked parts on the host, and the same as the call is given them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(zlib.crc32(case.id.encode()))
        shape = (case.parts, *case.shape)
        self.lses = (case.spread * rng.standard_normal(shape)).astype(np.float32)
        self.outs = rng.standard_normal((*shape, case.dim)).astype(DTYPES[case.dtype])
        none = rng.random(shape) < case.empty
        self.lses[none] = -np.inf
        self.outs[none] = np.nan

    def whole(self, array: Array) -> Array:
        """The array in one corner of a larger one, which is NaN."""
        if not self.case.padded:
            return np.ascontiguousarray(array)
        whole = np.full([n + (8 if n % 8 == 0 else 1) for n in array.shape], np.nan, array.dtype)
        self.corner(whole, array)[...] = array
        return whole

    def corner(self, whole: Any, like: Array) -> Any:
        return whole[tuple(slice(0, n) for n in like.shape)]

    def given(self, device: Any) -> tuple[Any, Any]:
        """Arguments on the device; parts apart have strides of their own, each its turn."""
        if self.case.stacked:
            pair = (self.outs, self.lses)
            return tuple(self.corner(device.to_device(self.whole(x)), x) for x in pair)
        outs, lses = [], []
        for i, (out, lse) in enumerate(zip(self.outs, self.lses, strict=True)):
            turned = self.case.padded and i % 2 == 1
            for list_, x in ((outs, out), (lses, lse)):
                axes = (1, 0, *range(2, x.ndim)) if turned and x.ndim > 1 else tuple(range(x.ndim))
                if x is out and out.ndim < 3:
                    axes = tuple(range(x.ndim))  # the last axis stays packed
                y = x.transpose(axes)
                list_.append(self.corner(device.to_device(self.whole(y)), y).transpose(axes))
        return outs, lses

    def run(self, device: Any) -> tuple[Array, Array]:
        """Run the call into guarded memory."""
        out = device.guarded(self.outs.shape[1:], DTYPES[self.case.out_dtype or self.case.dtype])
        lse = device.guarded(self.lses.shape[1:], np.float32)
        returned = cuattn.merge_states(
            *self.given(device), out=out.array, lse=lse.array, out_dtype=self.case.out_dtype
        )
        assert returned[0] is out.array and returned[1] is lse.array
        out.check(self.case)
        lse.check(self.case)
        return device.to_host(out.array), device.to_host(lse.array)

    def check(self, device: Any) -> tuple[Array, Array]:
        out, lse = self.run(device)
        wanted, rough = (merged(self.outs, self.lses, x) for x in (np.float64, np.float32))
        rounded = rough[0].astype(out.dtype)
        logits = np.abs(wanted[1][np.isfinite(wanted[1])]).max(initial=0.0)
        assert_close(lse, wanted[1], rough[1], self.case, "lse")
        assert_close(out, wanted[0], rounded, self.case, "out", float(logits))
        return out, lse


USUAL = Case()
CASES = [
    *(Case(parts=n, dtype=dtype) for n in (1, 2, 4, 5, 9) for dtype in DTYPES),
    *(Case(dtype=dtype, out_dtype=other) for dtype in DTYPES for other in DTYPES),
    *(Case(shape=shape) for shape in ((7,), (300, 3), (2, 5, 3), (1, 1, 1), (3, 1, 2))),
    *(Case(dim=dim) for dim in (8, 40, 128, 192, 256, 512, 2048)),
    *(Case(stacked=True, dtype=dtype) for dtype in DTYPES),
    Case(stacked=True, shape=(2, 5, 3), parts=6),
    Case(padded=False, dim=128),
    Case(spread=60.0),
    Case(spread=1e4),
    Case(empty=0.4, parts=5),
    Case(empty=0.9, parts=4, dtype="float16"),
    Case(empty=1.0),
    *(Case(parts=MOST_PARTS + n) for n in (0, 1)),
    Case(parts=2 * MOST_PARTS + 7, dtype="float32", empty=0.3),
    Case(parts=MOST_PARTS + 2, dtype="float16", stacked=True, shape=(2, 5, 3)),
]


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_as_close_as_plain_arithmetic(device: Any, case: Case) -> None:
    Call(case).check(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_part_is_copied_to_the_bit(device: Any, dtype: str) -> None:
    call = Call(Case(parts=1, dtype=dtype))
    call.outs.flat[:6] = [0.0, -0.0, 2.0**-14, -(2.0**-24), np.inf, -np.inf]
    out, lse = call.run(device)
    assert_same_bits(out, call.outs[0], call.case)
    assert_same_bits(lse, call.lses[0], call.case)


def test_parts_without_keys_count_for_nothing(device: Any) -> None:
    """Whatever their output is; so the rest is as if they had not been given."""
    call = Call(Case(parts=4))
    call.lses[1] = call.lses[3] = -np.inf
    call.outs[1], call.outs[3] = np.nan, np.inf
    out, lse = call.run(device)
    rest = Call(Case(parts=2))
    rest.lses, rest.outs = call.lses[::2], call.outs[::2]
    for seen, wanted in zip((out, lse), rest.run(device), strict=True):
        assert_same_bits(seen, wanted, call.case)


def test_rows_without_keys_are_zero(device: Any) -> None:
    call = Call(Case(parts=2))
    call.lses[:, 3, 1], call.outs[:, 3, 1] = -np.inf, np.nan
    out, lse = call.check(device)
    assert (bits(out[3, 1]) == 0).all() and lse[3, 1] == -np.inf


def test_results_are_made_where_none_are_given(device: Any) -> None:
    call = Call(USUAL)
    out, lse = cuattn.merge_states(*call.given(device), out_dtype="float32")
    assert isinstance(out, device.xp.ndarray) and out.dtype == lse.dtype == np.float32
    wanted = merged(call.outs, call.lses, np.float64)
    np.testing.assert_allclose(device.to_host(out), wanted[0], atol=1e-5)
    np.testing.assert_allclose(device.to_host(lse), wanted[1], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (2, 0, 4)])
def test_no_rows(device: Any, shape: tuple[int, ...]) -> None:
    outs = [device.to_device(np.zeros((*shape, 64), np.float16))] * 2
    lses = [device.to_device(np.zeros(shape, np.float32))] * 2
    out, lse = cuattn.merge_states(outs, lses)
    assert out.shape == (*shape, 64) and lse.shape == shape


def test_halves_of_the_keys_make_the_whole(device: Any) -> None:
    """Two prefill calls merged are one over all keys: natural logarithms on both sides."""
    call = batched(Attention(lengths=((20, 90),), causal=False, memory="packed"))
    q, k, v = call.arrays
    parts = []
    for keys in (slice(0, 37), slice(37, None)):
        some = (q, np.ascontiguousarray(k[:, keys]), np.ascontiguousarray(v[:, keys]))
        parts.append(
            cuattn.prefill(*map(device.to_device, some), return_lse=True, out_dtype="float32")
        )
    out, lse = (device.to_host(x) for x in cuattn.merge_states(*zip(*parts, strict=True)))
    wanted = call.reference()
    np.testing.assert_allclose(lse, wanted.lse, atol=1e-5)
    np.testing.assert_allclose(out, wanted.out, atol=1e-2)


# Every branch of the kernel between them.
RACES = [
    USUAL,
    Case(dtype="float16", out_dtype="float32", empty=0.4),
    Case(dtype="float16", empty=1.0, stacked=True),
    Case(parts=MOST_PARTS + 3, dtype="float32"),
    Case(dim=40, shape=(3, 1, 2), dtype="float32", out_dtype="bfloat16"),
]


def run_races(**options: Any) -> None:
    from conftest import Emulated

    for case in RACES:
        with emulator.enabled(**options) as launches:
            Call(case).check(Emulated())
        assert len(launches) == -(-case.parts // MOST_PARTS)


@pytest.mark.emulator
@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_in_race_mode(schedule: Any) -> None:
    run_races(race=True, schedule=schedule)


# --- errors --------------------------------------------------------------------------------------


def real(*shape: int, dtype: str = "float16") -> Array:
    return np.zeros(shape, DTYPES[dtype])


def lse_of(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


GOOD: dict[str, Any] = {
    "outs": (real(5, 3, 64), real(5, 3, 64)),
    "lses": (lse_of(5, 3), lse_of(5, 3)),
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"outs": ()}, "outs is empty; wanted at least one part"),
    ({"lses": ()}, "lses is empty; wanted at least one part"),
    ({"outs": real(0, 5, 3, 64)}, r"outs has shape \(0, 5, 3, 64\); wanted \[parts, …\]"),
    ({"outs": 3.5}, "outs is a float; wanted an array"),
    ({"lses": (lse_of(5, 3),)}, "lses has 1 parts; wanted as many as outs, 2"),
    ({"outs": (real(5, 3, 64), real(5, 4, 64))}, r"outs\[1\] has shape .* wanted outs\[0\]'s"),
    ({"outs": (real(5, 3, 64), real(5, 3, 64, dtype="float32"))}, r"outs\[1\] is float32; wanted"),
    ({"outs": (index := np.zeros((5, 3, 64), np.int32), index)}, r"outs\[0\] is int32; wanted"),
    ({"outs": (real(64), real(64))}, r"outs\[0\] has shape \(64,\); wanted 2 to 4 axes"),
    ({"outs": (real(5, 3, 60),) * 2}, r"outs\[0\] has head_dim 60; wanted a multiple of 8"),
    ({"outs": (real(5, 3, 4096),) * 2}, r"outs\[0\] has head_dim 4096; wanted .* 8 to 2048"),
    ({"outs": (real(5, 3, 64), real(5, 3, 68)[..., :64])}, r"outs\[1\] has stride 204"),
    ({"lses": (lse_of(5, 3), lse_of(3, 5))}, r"lses\[1\] has shape \(3, 5\); wanted \(5, 3\)"),
    ({"lses": (lse_of(5, 3), real(5, 3))}, r"lses\[1\] is float16; wanted float32"),
    ({"out": real(5, 3, 64, dtype="float32")}, r"out is float32; wanted float16 \(outs' dtype\)"),
    ({"out": real(5, 3, 64), "out_dtype": "float32"}, r"wanted float32 \(out_dtype\)"),
    ({"out": real(5, 3, 72)}, r"out has shape \(5, 3, 72\); wanted outs\[0\]'s"),
    ({"lse": lse_of(5, 3, 1)}, r"lse has shape \(5, 3, 1\); wanted \(5, 3\)"),
    ({"out_dtype": "float64"}, "out_dtype is float64; wanted bfloat16, float16, float32"),
]


def to(device: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to(device, part) for part in value)
    return device.to_device(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_errors_are_one_sentence(device: Any, change: dict[str, Any], sentence: str) -> None:
    given = {name: to(device, value) for name, value in (GOOD | change).items()}
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        cuattn.merge_states(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_share_no_memory_with_parts(device: Any, name: str) -> None:
    given = {key: to(device, value) for key, value in GOOD.items()}
    part = given["outs" if name == "out" else "lses"][1]
    with pytest.raises(ValueError, match=rf"{name} shares memory with {name}?\w*s\[1\]"):
        cuattn.merge_states(**given, **{name: part})


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [3, MOST_PARTS + 3])
def test_a_captured_call_replays(gpu: Any, parts: int) -> None:
    import cupy

    call = Call(replace(USUAL, parts=parts, padded=False))
    outs, lses = call.given(gpu)
    out = gpu.guarded(call.outs.shape[1:], call.outs.dtype).array
    lse = gpu.guarded(call.lses.shape[1:], np.float32).array
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cuattn.merge_states(outs, lses, out=out, lse=lse)
        stream.begin_capture()
        cuattn.merge_states(outs, lses, out=out, lse=lse)
        graph = stream.end_capture()
        other = [cupy.full(call.outs.shape[1:], 7, np.float32) for _ in range(8)]
        for shift in (0.0, 2.0):
            call.lses[0] += np.float32(shift)
            lses[0].set(call.lses[0])
            graph.launch()
            stream.synchronize()
            wanted = merged(call.outs, call.lses, np.float64)
            np.testing.assert_allclose(gpu.to_host(lse), wanted[1], atol=1e-5)
            seen = gpu.to_host(out).astype(np.float64)
            np.testing.assert_allclose(seen, wanted[0], atol=2e-2)
    assert all((x == 7).all() for x in other), "a replay wrote to memory that was given back"

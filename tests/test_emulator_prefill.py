"""The prefill kernel in race mode, in every order, and in the tiles of every architecture.

The whole tables of cases run in the emulator too, through the fixture `device`, where there is no
GPU: see `test_prefill.py` and `test_skip.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import RAGGED, USUAL, Call, Case, batched, numpy_skip, paged, problem_of, ragged
from compare import assert_bounds, assert_close

import cuattn
from cuattn import _device, _heuristics, _shipped, emulator
from cuattn._records import Device, SkipMode

pytestmark = pytest.mark.emulator

SMALL = replace(USUAL, lengths=((70, 140),), q_heads=2, kv_heads=1)
UNEVEN = ((7, 64), (33, 150), (0, 5), (65, 65), (5, 0))

# Every branch of the kernel between them.
RACES: dict[str, Call] = {
    "usual": batched(SMALL),
    "full": batched(replace(SMALL, causal=False)),
    "large-head": batched(replace(SMALL, d_qk=128, d_v=128)),
    "unequal-heads": batched(replace(SMALL, d_qk=192, d_v=128)),
    "largest-head": batched(replace(SMALL, d_qk=256, d_v=256)),
    "fp16-window": batched(replace(SMALL, dtype="float16", window_left=20)),
    "soft-cap-sinks": batched(replace(SMALL, soft_cap=20.0, sinks=True)),
    "float32-out": batched(replace(SMALL, out_dtype="float32", out_scale=2.5, device_scalars=True)),
    "ragged": ragged(replace(SMALL, lengths=UNEVEN)),
    "paged": paged(replace(SMALL, lengths=UNEVEN)),
    "paged-NHD": paged(replace(SMALL, lengths=UNEVEN, layout="NHD", page_size=32)),
}
UNLIKE = replace(SMALL, data="structured", scale=0.25)
LONG = batched(replace(UNLIKE, lengths=((70, 400),)))
SKIPS: dict[str, tuple[Call, dict[str, Any]]] = {
    "skip": (LONG, {"threshold": 0.3}),
    "skip-paged": (
        paged(replace(UNLIKE, lengths=((40, 400), (7, 64)))),
        {"threshold_scale_factor": 150.0, "certificate": True},
    ),
    "skip-live": (LONG, {"threshold": np.array([[0.4, 0.1]], np.float32)}),
}
ORDERS: tuple[dict[str, Any], ...] = (
    {"schedule": "forward", "mode": "late"},
    {"schedule": "reverse", "mode": "early"},
    {"schedule": 3, "mode": "random"},
)


def run(call: Call, **options: Any) -> tuple[np.ndarray, ...]:
    """Output, LSE and certificate in race mode, or with other options of `emulator.enabled`."""
    skip = options.pop("skip", None)
    with emulator.enabled(**{"race": True, **options}) as launches:
        results: tuple[np.ndarray, ...] = getattr(cuattn, call.function)(
            *call.arrays, **call.options, skip_softmax=skip, return_lse=True
        )
    assert [launch.bank_conflicts for launch in launches] == [0]
    return results


def check(call: Call, out: np.ndarray, lse: np.ndarray, **replay: Any) -> None:
    expected, plain = call.reference(**replay), call.plain(**replay)
    assert_close(lse, expected.lse, plain.lse, call.case, "lse")
    assert_close(out, expected.out, plain.out, call.case, "out")


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: f"{o['schedule']}-{o['mode']}")
@pytest.mark.parametrize("name", RACES)
def test_no_race(name: str, options: dict[str, Any]) -> None:
    call = RACES[name]
    check(call, *run(call, **options))


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: f"{o['schedule']}-{o['mode']}")
@pytest.mark.parametrize("name", SKIPS)
def test_no_race_with_skipping(name: str, options: dict[str, Any]) -> None:
    call, fields = SKIPS[name]
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(**fields, stats=stats)
    out, lse, *lost = run(call, skip=skip, **options)
    plan = _heuristics.prefill(problem_of(call, SkipMode("threshold", False)), _device.EMULATOR)
    replay = {"geometry": plan.geometry, "skip_softmax": numpy_skip(**fields)}
    expected = call.reference(**replay)
    assert len(lost) == skip.certificate
    for certificate in lost:
        assert_bounds(certificate, expected.dropped_mass, call.case)
    assert expected.margin > 1e-4, "a vote is too close to call"
    assert (stats.visited, stats.skipped) == (expected.visited.sum(), expected.skipped.sum())
    assert 0 < stats.skipped < stats.visited
    check(call, out, lse, **replay)


@pytest.mark.parametrize("build", (batched, ragged, paged), ids=lambda f: f.__name__)
def test_order_does_not_matter_to_the_bit(build: Any) -> None:
    call = build(Case(lengths=((70, 140),) if build is batched else RAGGED))
    first = run(call, race=False)
    for options in ORDERS[1:]:
        for one, other in zip(first, run(call, race=False, **options), strict=True):
            words = f"u{one.dtype.itemsize}"
            np.testing.assert_array_equal(one.view(words), other.view(words))


def card(arch: str) -> Device:
    return replace(_device.EMULATOR, arch=arch, shared_memory=_heuristics.SHARED_MEMORY[arch])


def tiles() -> list[Any]:
    """One parameter for each different configuration that the architectures lead to."""
    found: dict[Any, Any] = {}
    for arch in sorted(_heuristics.SHARED_MEMORY):
        for dims in _shipped.HEAD_DIMS:
            case = Case(lengths=((70, 140),), d_qk=dims[0], d_v=dims[1], q_heads=2, kv_heads=1)
            plan = _heuristics.prefill(problem_of(batched(case)), card(arch))
            found.setdefault(plan.config, pytest.param(arch, case, id=f"{arch}-{case}"))
    return list(found.values())


@pytest.mark.parametrize(("arch", "case"), tiles())
def test_every_tile_of_every_architecture(arch: str, case: Case) -> None:
    call = batched(case)
    check(call, *run(call, device=card(arch)))

"""The small product of `conformance/hopper.py` in every order, and with one fault at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from conformance import hopper, on_emulator
from conformance.case import compare

from cuattn import emulator

pytestmark = pytest.mark.emulator


def launch(config: str = ".swizzle = 128", **options: Any) -> dict[str, np.ndarray]:
    return on_emulator.run(hopper.case(config), **{"race": False, **options})


MODES = ("late", "early", "random")
ORDERS: list[dict[str, Any]] = [
    {"schedule": order, "mode": mode, "race": race}
    for order in ("forward", "reverse", 1, 2)
    for mode in MODES
    for race in (False, True)
]


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "-".join(map(str, o.values())))
def test_product(options: dict[str, Any]) -> None:
    case = hopper.case()
    assert case.expected is not None
    compare(case, launch(**options), case.expected(case.inputs))


@dataclass(frozen=True)
class Fault:
    """A broken kernel and what its report must say, in race mode."""

    config: str
    message: str
    plain: bool = False  # found without race mode too


IN_FLIGHT = "accumulator register 3 was (read|written) while a wgmma is in flight"
FAULTS = {
    "missing-full-wait": Fault(".wait_full = false", "race, read after write|never written"),
    "missing-empty-wait": Fault(".wait_empty = false", "race, write after|more arrivals"),
    "parity-never-flips": Fault(".flip_parity = false", "race, |more arrivals"),
    "forgotten-arrive": Fault(".arrive_empty = false", "deadlock[^$]*4 of 4 arrivals", True),
    "too-few-arrivals": Fault(".empty_arrivals = 1", "more arrivals than|race, write after"),
    "too-many-arrivals": Fault(".empty_arrivals = 5", "deadlock[^$]*1 of 5 arrivals", True),
    "wrong-byte-count": Fault(".missing_bytes = 128", "deadlock[^$]*-128 bytes missing", True),
    "missing-sync-after-init": Fault(".sync_after_init = false", "not initialised|race, read"),
    "missing-init-fence": Fault(".fence_init = false", "without fence.mbarrier_init", True),
    "missing-wgmma-fence": Fault(".wgmma_fence = false", "without a wgmma.fence", True),
    "missing-wgmma-wait": Fault(".wgmma_wait = false", "without a wgmma.fence|race, write after"),
    "touched-in-flight": Fault(".touch_in_flight = true", IN_FLIGHT, True),
    "missing-proxy-fence": Fault(".proxy_fence = false", "no fence.proxy.async between"),
    "missing-store-wait": Fault(".wait_store = false", "bulk stores in flight", True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(emulator.EmulatorError, match=fault.message) as caught:
        launch(fault.config, race=True)
    assert "conformance.cu:" in str(caught.value)
    if fault.plain:
        with pytest.raises(emulator.EmulatorError, match=fault.message):
            launch(fault.config)


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_touching_accumulators_is_reported(mode: str, race: bool) -> None:
    with pytest.raises(emulator.EmulatorError, match=IN_FLIGHT):
        launch(".touch_in_flight = true", mode=mode, race=race)


def peek(**options: Any) -> np.ndarray:
    """The product as a kernel reads it that waits for its last wgmmas only after that."""
    source = hopper.SOURCE
    for old, new in (
        ("if (plan.wgmma_wait) wgmma_wait", "if (step + 1 < steps) wgmma_wait"),
        ("if (!plan.wgmma_wait) wgmma_wait<0>();", "named_barrier_sync<2, 128>();"),
        ("// 16 columns each", "\n    if (step == 0) wgmma_wait<0>();"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    return on_emulator.run(replace(hopper.case(), source=source), **{"race": False, **options})["c"]


@pytest.mark.parametrize("schedule", ["forward", "reverse", 1])
def test_accumulators_before_the_wait(schedule: str | int) -> None:
    """NaN as long as a wgmma may take, right as soon as it may be over."""
    assert np.isnan(peek(mode="late", schedule=schedule)).all()
    np.testing.assert_array_equal(peek(mode="early", schedule=schedule), launch()["c"])


def test_accumulators_before_the_wait_at_random() -> None:
    seen = {bool(np.isnan(peek(mode="random", schedule=seed)).all()) for seed in range(8)}
    assert seen == {False, True}


@pytest.mark.parametrize("mode", MODES)
def test_reading_accumulators_before_the_wait_is_reported(mode: str) -> None:
    with pytest.raises(emulator.EmulatorError, match="register 0 was read while a wgmma"):
        peek(mode=mode, race=True)


def test_wrong_swizzle_changes_the_result() -> None:
    right, wrong = launch()["c"], launch(".swizzle = 64")["c"]
    assert np.abs(right - wrong).max() > 1

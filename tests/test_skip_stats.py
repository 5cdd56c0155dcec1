"""The counters of skip-softmax, and what a `SkipSoftmax` refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import SKIP_CASES, batched
from compare import assert_same_bits

SHORT = replace(SKIP_CASES[0], lengths=((200, 500),) * 2)


class TestStats:
    """Counters add up until they are reset, and cost the result nothing."""

    def test_accumulate_and_reset(self, device: Any) -> None:
        import cuattn

        call = batched(SHORT)
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(threshold=0.3, stats=stats)
        seen = []
        for _ in range(3):
            device.run(call, skip_softmax=skip)
            seen.append(stats.per_head())
        for name in ("visited", "skipped"):
            assert seen[0][name].all()
            for times, later in enumerate(seen, start=1):
                np.testing.assert_array_equal(later[name], times * seen[0][name])
        stats.reset()
        device.run(call, skip_softmax=skip)
        np.testing.assert_array_equal(stats.per_head()["visited"], seen[0]["visited"])

    def test_shapes_are_batch_by_heads(self, device: Any) -> None:
        import cuattn

        call = batched(replace(SHORT, q_heads=8, kv_heads=1))
        stats = cuattn.SkipStats()
        device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.3, stats=stats))
        seen = stats.per_head()
        assert set(seen) == {"visited", "skipped", "ineligible"}
        assert {array.shape for array in seen.values()} == {(2, 8)}
        assert 0 < stats.rate < 1

    def test_another_shape_is_refused_until_reset(self, device: Any) -> None:
        import cuattn

        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(threshold=0.3, stats=stats)
        device.run(batched(SHORT), skip_softmax=skip)
        before = stats.visited
        other = batched(replace(SHORT, q_heads=8))
        with pytest.raises(ValueError, match="stats"):
            device.run(other, skip_softmax=skip)
        assert stats.visited == before > 0
        stats.reset()
        device.run(other, skip_softmax=skip)
        assert stats.per_head()["visited"].shape == (2, 8)

    def test_counting_does_not_change_bits(self, device: Any) -> None:
        import cuattn

        call = batched(SHORT)
        plain = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.3))
        stats = cuattn.SkipStats()
        counted = device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=0.3, stats=stats))
        assert_same_bits(counted.out, plain.out, call.case)
        assert_same_bits(counted.lse, plain.lse, call.case)
        assert stats.skipped > 0

    def test_nothing_counted_is_a_rate_of_zero_or_nan(self, device: Any) -> None:
        import cuattn

        stats = cuattn.SkipStats()
        assert (stats.visited, stats.skipped, stats.ineligible) == (0, 0, 0)
        assert not stats.rate > 0


def wrong_fields() -> Iterator[tuple[dict[str, Any], str]]:
    yield {}, "threshold"
    yield {"threshold": 0.5, "threshold_scale_factor": 100.0}, "threshold"
    yield {"threshold": 0.5, "max_dropped_mass": 0.01}, "threshold|max_dropped_mass"
    for name in ("threshold", "threshold_scale_factor"):
        for value in (math.nan, math.inf, -0.1):
            yield {name: value}, name
    yield {"threshold": 1.0}, "unsafe"
    yield {"threshold": 5.0}, "unsafe"


@pytest.mark.parametrize(("fields", "words"), list(wrong_fields()), ids=str)
def test_a_threshold_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    import cuattn

    with pytest.raises(ValueError, match=words):
        cuattn.SkipSoftmax(**fields)


def test_what_prefill_cannot_honour_is_refused(device: Any) -> None:
    import cuattn

    call = batched(SHORT)
    with pytest.raises(ValueError, match="max_dropped_mass"):
        device.run(call, skip_softmax=cuattn.SkipSoftmax(max_dropped_mass=0.01))
    with pytest.raises((TypeError, ValueError), match="skip_softmax"):
        device.run(call, skip_softmax=0.1)
    for shape in ((3,), (2, 3), (4, 2), (2, 4, 1), ()):
        live = device.to_device(np.full(shape, 0.1, np.float32))
        with pytest.raises(ValueError, match="threshold"):
            device.run(call, skip_softmax=cuattn.SkipSoftmax(threshold=live))

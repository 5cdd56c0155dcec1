"""The comparison must fail when it should."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close, assert_same_bits

EXPECTED = np.random.default_rng(0).standard_normal((20, 4, 8))
PLAIN = EXPECTED.astype(ml_dtypes.bfloat16)


def test_comparison_takes_what_plain_arithmetic_gives() -> None:
    assert_close(PLAIN, EXPECTED, PLAIN, "case")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_comparison_refuses_a_lost_number(value: float) -> None:
    wrong = PLAIN.copy()
    wrong[3, 2, 1] = value
    with pytest.raises(AssertionError, match=r"a case: out\[3, 2, 1\] is .*1 of 640"):
        assert_close(wrong, EXPECTED, PLAIN, "a case")


def test_comparison_refuses_one_wrong_element() -> None:
    wrong = PLAIN.copy()
    wrong[19, 0, 7] += ml_dtypes.bfloat16(0.1)
    with pytest.raises(AssertionError, match=r"out\[19, 0, 7\] .* 1 of 640 elements"):
        assert_close(wrong, EXPECTED, PLAIN, "case")


def test_comparison_refuses_a_small_error_everywhere() -> None:
    wrong = (EXPECTED * 1.009).astype(ml_dtypes.bfloat16)
    with pytest.raises(AssertionError, match=r"as a whole|too far"):
        assert_close(wrong, EXPECTED, PLAIN, "case")


def test_comparison_refuses_nothing_to_compare() -> None:
    none = np.zeros((0, 4))
    with pytest.raises(AssertionError, match="nothing would be compared"):
        assert_close(none.astype(np.float32), none, none, "case")


def test_bits_tell_apart_what_equality_does_not() -> None:
    zeros = np.zeros(3, np.float16)
    nan = np.full(3, np.nan, np.float16)
    assert_same_bits(nan, nan.copy(), "case")
    with pytest.raises(AssertionError, match=r"1 of 3 elements .* \[1\]: -0.0 against 0.0"):
        assert_same_bits(np.array([0.0, -0.0, 0.0], np.float16), zeros, "case")
    with pytest.raises(AssertionError, match="float16"):
        assert_same_bits(zeros.astype(np.float32), zeros, "case")

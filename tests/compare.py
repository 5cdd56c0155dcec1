"""How close is close enough: no worse than twice the error of plain NumPy arithmetic.

A tolerance is earned, never chosen: `reference` runs twice, in float64 and in plain arithmetic of
the same dtype, and the distance between the two is what any honest kernel may err by.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# One step between neighbouring numbers, relative.  `str` because NumPy's finfo lacks bfloat16.
STEP = {
    "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps),
    "float16": float(np.finfo(np.float16).eps),
    "float32": float(np.finfo(np.float32).eps),
}
# The GPU's exp2 and log2 are right to 2^-22 each; LSE is the one result that shows it.
LSE_APPROXIMATION = 2.0**-21
# Largest relative difference of the whole tensor that two orders of summation make in plain float32
# arithmetic when the result needs no rounding at all.
NORM_STEP = 2.0**-20


def assert_close(
    actual: Array, expected: Array, plain: Array, case: Any, what: str = "out"
) -> None:
    """Demand that `actual` is as close to `expected` (float64) as plain arithmetic, twice over.

    Two tests: the largest error against the largest error of `plain` plus one rounding step of the
    element, and the error of the whole tensor (Frobenius norm) against that of `plain`.
    """
    assert actual.shape == expected.shape == plain.shape, (
        f"{case}: {what} has the shape {actual.shape}; wanted {expected.shape}"
    )
    assert expected.size, f"{case}: {what} is empty, nothing would be compared"
    step = STEP[str(actual.dtype)]
    seen, wanted, rough = (np.asarray(x).astype(np.float64) for x in (actual, expected, plain))
    _assert_same_places(seen, wanted, case, what)
    finite = np.isfinite(wanted)
    seen, wanted, rough = (np.where(finite, x, 0.0) for x in (seen, wanted, rough))

    error = np.abs(seen - wanted)
    largest = 2 * np.abs(rough - wanted).max() + (LSE_APPROXIMATION if what == "lse" else 0.0)
    excess = error - (largest + step * np.abs(wanted))
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    assert excess[worst] <= 0, (
        f"{case}: {what}{list(worst)} is {seen[worst]:.9g}; wanted {wanted[worst]:.9g}, error "
        f"{error[worst]:.3g} with {largest + step * abs(wanted[worst]):.3g} allowed; "
        f"{int((excess > 0).sum())} of {excess.size} elements are too far"
    )
    norm = np.linalg.norm
    distance, scale = float(norm(error)), float(norm(wanted))
    allowed = 2 * float(norm(rough - wanted)) + max(NORM_STEP, step / 8) * scale
    if what == "lse":
        allowed += LSE_APPROXIMATION * wanted.size**0.5
    assert distance <= allowed, (
        f"{case}: {what} as a whole is {distance:.3g} from float64 with {allowed:.3g} allowed; the "
        f"worst element {list(worst)} is {seen[worst]:.9g}, wanted {wanted[worst]:.9g}"
    )


def _assert_same_places(seen: Array, wanted: Array, case: Any, what: str) -> None:
    """inf, -inf and NaN must be where they are expected, and nowhere else."""
    for name, place in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        differ = place(seen) != place(wanted)
        if differ.any():
            where = tuple(int(i) for i in np.argwhere(differ)[0])
            raise AssertionError(
                f"{case}: {what}{list(where)} is {seen[where]}; wanted {wanted[where]} "
                f"({int(differ.sum())} of {differ.size} elements differ in {name})"
            )


def bits(array: Array) -> Array:
    """The raw bits, so that equality is of bits (-0 differs from 0, NaN equals itself)."""
    array = np.ascontiguousarray(array)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def assert_same_bits(actual: Array, expected: Array, case: Any) -> None:
    """Demand the same result to the last bit."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{case}: {actual.dtype}{actual.shape} against {expected.dtype}{expected.shape}"
    )
    assert actual.size, f"{case}: empty, nothing would be compared"
    differ = bits(actual) != bits(expected)
    if differ.any():
        where = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{case}: {int(differ.sum())} of {differ.size} elements differ in their bits, first "
            f"{list(where)}: {actual[where]!s} against {expected[where]!s}"
        )

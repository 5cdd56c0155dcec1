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
# The GPU's exp2, log2 and reciprocal are right to 2^-22 each; LSE is the one result that shows it,
# and a soft cap multiplies what they make of tanh.
LSE_APPROXIMATION = 2.0**-21
# Largest relative difference of the whole tensor that two orders of summation make in plain float32
# arithmetic when the result needs no rounding at all.
NORM_STEP = 2.0**-20
NAN_BITS = {2: 0x7FD5, 4: 0x7FC0BEEF}  # a NaN that nothing computes, by item size


def assert_close(
    actual: Array,
    expected: Array,
    plain: Array,
    case: Any,
    what: str = "out",
    logits: float = 0.0,
) -> None:
    """Demand that `actual` is as close to `expected` (float64) as plain arithmetic, twice over.

    Two tests: the largest error against the largest error of `plain` plus one rounding step of the
    element, and the error of the whole tensor (Frobenius norm) against that of `plain`.

    `logits` is the size of the largest logit.  float32 holds it to one step, which changes weights
    by that share; with logits of 1e5 that is 1 %, and on which few rows it falls is chance.
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

    blur = STEP["float32"] * logits  # relative
    approximate = 0.0  # absolute
    if what == "lse":
        approximate = LSE_APPROXIMATION * max(1.0, getattr(case, "soft_cap", 0.0))
    error = np.abs(seen - wanted)
    largest = 2 * np.abs(rough - wanted).max() + blur * np.abs(wanted).max() + approximate
    excess = error - (largest + step * np.abs(wanted))
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    assert excess[worst] <= 0, (
        f"{case}: {what}{list(worst)} is {seen[worst]:.9g}; wanted {wanted[worst]:.9g}, error "
        f"{error[worst]:.3g} with {largest + step * abs(wanted[worst]):.3g} allowed; "
        f"{int((excess > 0).sum())} of {excess.size} elements are too far"
    )
    norm = np.linalg.norm
    distance = float(norm(error))
    allowed = 2 * float(norm(rough - wanted)) + approximate * wanted.size**0.5
    allowed += (max(NORM_STEP, step / 8) + blur) * float(norm(wanted))
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    assert distance <= allowed, (
        f"{case}: {what} as a whole is {distance:.3g} from float64 with {allowed:.3g} allowed; the "
        f"worst element {list(worst)} is {seen[worst]:.9g}, wanted {wanted[worst]:.9g}"
    )


def assert_same_share(
    actual: Array, expected: Array, lse_error: float, case: Any, logits: float = 0.0
) -> None:
    """Demand dropped shares to be those of float64, relatively, wherever there is a row.

    A share is exp(LSE of the dropped - LSE of all), so it errs relatively by as much as two LSEs
    err absolutely; `lse_error` is that of plain arithmetic.
    """
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    rows = np.isfinite(expected)
    assert rows.any(), f"{case}: no row has a dropped share, nothing would be compared"
    approximate = LSE_APPROXIMATION * max(1.0, getattr(case, "soft_cap", 0.0))
    allowed = 4 * (lse_error + approximate + STEP["float32"] * max(1.0, logits))
    seen, wanted = actual[rows].astype(np.float64), expected[rows]
    np.testing.assert_array_equal(seen > 1e-30, wanted > 1e-30, f"{case}: dropped_mass")
    np.testing.assert_allclose(seen, wanted, allowed, 1e-30, err_msg=f"{case}: dropped_mass")


def assert_bounds(actual: Array, lost: Array, case: Any) -> None:
    """Demand certificates to be no less than float64 says was lost, and 0 where that is nothing.

    There is no tolerance: their margin covers rounding.
    """
    rows = np.isfinite(lost)
    seen, wanted = actual[rows].astype(np.float64), lost[rows]
    np.testing.assert_array_equal(seen > 0, wanted > 0, f"{case}: certificate")
    worst = int((wanted - seen).argmax())
    assert (seen >= wanted).all(), f"{case}: {wanted[worst]} was lost, certified are {seen[worst]}"
    assert seen.max() <= 1, f"{case}: a certificate is above 1"


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

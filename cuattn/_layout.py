"""What an array's layout is, whatever road it came by: strides in elements, and a token."""

from __future__ import annotations

from functools import lru_cache
from itertools import count

_Shape = tuple[int, ...]

_tokens = count(1)


def normalised(shape: _Shape, strides: _Shape | None) -> _Shape:
    """Return strides with the packed value where no element depends on them.

    Those are axes of length 1, and all axes of a zero-size array; None stands for packed data.
    """
    if strides is None or 0 in shape:
        strides = (0,) * len(shape)
        free = list(range(len(shape)))
    elif 1 in shape:
        free = [axis for axis, size in enumerate(shape) if size == 1]
    else:
        return strides
    fixed = list(strides)
    for axis in reversed(free):
        last = axis + 1 == len(shape)
        fixed[axis] = 1 if last else fixed[axis + 1] * max(shape[axis + 1], 1)
    return tuple(fixed)


def in_elements(name: str, byte_strides: _Shape, itemsize: int) -> _Shape:
    """Return strides in elements, or raise TypeError naming the argument."""
    if any(step % itemsize for step in byte_strides):
        raise TypeError(
            f"{name} has strides of {byte_strides} bytes; wanted multiples of its "
            f"{itemsize}-byte elements"
        )
    return tuple(step // itemsize for step in byte_strides)


@lru_cache(maxsize=4096)
def token_of(shape: _Shape, strides: _Shape, dtype: str, device: int) -> int:
    """Return a number that no other layout ever has; one forgotten gets another when it returns."""
    return next(_tokens)

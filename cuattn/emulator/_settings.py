"""How the public functions run on CPU arrays while `enabled` is in force."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import _device, _host, _sources
from .._records import Device
from ._run import Counts


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run, see `emulator.run`, and which device to plan for."""

    schedule: str | int = "forward"
    mode: str = "late"
    race: bool = False
    device: Device = _device.EMULATOR
    sources: _sources.Sources | None = None
    launches: list[Counts] | None = field(default=None, compare=False)


_USUAL = Settings()
_said = False


@contextmanager
def enabled(
    *,
    schedule: str | int = "forward",
    mode: str = "late",
    race: bool = False,
    device: Device = _device.EMULATOR,
    sources: _sources.Sources | None = None,
) -> Iterator[list[Counts]]:
    """Let the public functions take CPU arrays and return NumPy arrays.

    NumPy arrays, and PyTorch tensors and JAX arrays on the CPU, are taken; the kernels' own sources
    run on them, thousands of times slower than on a GPU. In force for the whole process, until the
    end of the `with`; the environment variable ``CUATTN_EMULATOR=1`` does the same for good.

    Parameters
    ----------
    schedule, mode, race, sources
        As in `emulator.run`.
    device : Device
        What plans are made for. Default: a stand-in for an H200.

    Yields
    ------
    list of Counts
        What each launch did, as they come.

    Examples
    --------
    >>> import cuattn, numpy as np
    >>> x = np.ones((1, 4, 1, 8), np.float16)
    >>> with cuattn.emulator.enabled():                                     # doctest: +SKIP
    ...     cuattn.prefill(x, x, x).shape
    (1, 4, 1, 8)
    """
    launches: list[Counts] = []
    settings = Settings(schedule, mode, race, device, sources, launches)
    _host.in_force.append(settings)
    try:
        yield launches
    finally:
        _host.in_force.remove(settings)


def current() -> Settings:
    """Return the settings in force; the first call says what this is."""
    global _said
    if not _said:
        _said = True
        warnings.warn(
            "cuattn runs on its emulator: the GPU kernels' sources on the CPU, right in their "
            "results and slow; no time taken here says anything about a GPU",
            UserWarning,
            stacklevel=5,  # the caller of the public function
        )
    return _host.in_force[-1] if _host.in_force else _USUAL

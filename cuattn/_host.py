"""Arrays in host memory: refused, unless the emulator was asked for, which runs kernels on them."""

from __future__ import annotations

import os
from typing import Any

_HINT = "or CUATTN_EMULATOR=1 or cuattn.emulator.enabled() to run on the CPU emulator"

in_force: list[Any] = []  # settings of every `emulator.enabled`, the innermost last


def emulated() -> bool:
    """Say whether calls on CPU arrays are to be run by the emulator."""
    return bool(in_force) or os.environ.get("CUATTN_EMULATOR", "0") not in ("", "0")


def admit(name: str, what: str, where: str, wanted: str) -> None:
    """Raise TypeError for a CPU array unless the emulator was asked for."""
    if not emulated():
        raise TypeError(f"{name} is on {where} ({what}); wanted {wanted}, {_HINT}")

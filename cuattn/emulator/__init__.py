"""The real CUDA kernels on a CPU: a functional model of a thread block, for tests and demos.

The kernels' sources are compiled by g++ with host twins of `core/device.cuh` and `ptx/` in front of
the include path. Every CUDA thread is a fiber; what the lanes of a warp do together, barriers and
asynchronous copies follow CUDA's rules, and a breach of one is an `EmulatorError` that names the
line. It models neither time nor the memory hierarchy, and shows nothing about a GPU's speed.
"""

from __future__ import annotations

from ._memory import Memory
from ._report import EmulatorError
from ._run import Counts, run
from ._settings import enabled
from ._tensor_map import tensor_map

__all__ = ["Counts", "EmulatorError", "Memory", "enabled", "run", "tensor_map"]

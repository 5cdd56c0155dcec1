"""Run a case in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn import emulator

from .case import Array, Case


def run(case: Case, **options: Any) -> dict[str, Array]:
    """The case's results, by default in race mode; see `emulator.run` for the options."""
    with emulator.Memory() as memory:
        pointers = {name: memory.add(name, array) for name, array in case.inputs.items()}
        for name, array in case.results.items():
            pointers[name] = memory.add(name, array, writable=True)
        arrays = {**case.inputs, **case.results}
        maps = []
        for m in case.maps:
            array = arrays[m.buffer]
            maps.append(
                emulator.tensor_map(
                    pointers[m.buffer],
                    array.itemsize,
                    array.shape[::-1],
                    array.strides[-2::-1],
                    m.box,
                    m.swizzle,
                )
            )
        params = case.params(maps, list(pointers.values()))
        options = {"race": True, **options}
        emulator.run(
            "conformance", case.config, 1, case.threads, params, sources=case.sources(), **options
        )
        return {name: np.array(memory[name]) for name in case.results}

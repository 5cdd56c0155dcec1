"""The same as `test_twins.py` for the kernels that are no attention."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("cupy")

from test_twins import compile_asserts

from cuattn import _sources, _tool_params, merge
from cuattn._tool_params import (
    APPEND,
    MERGE,
    VALIDATE,
    AppendConfig,
    Fault,
    MergeConfig,
    Parameters,
    ValidateConfig,
)

KERNELS = {
    "append_kv": (APPEND, AppendConfig(warps=8, vectors=2)),
    "merge_states": (MERGE, MergeConfig("float16", "float32", True, 128)),
    "validate": (VALIDATE, ValidateConfig(warps=2)),
}


def offsets(parameters: Parameters) -> tuple[dict[str, int], int]:
    """Where each field lies as Python packs it, and the size of all."""
    places, at = {}, 0
    codes = dict.fromkeys(parameters.pointers, "Q") | dict(parameters.numbers)
    for name, code in codes.items():
        places[name] = at
        at += struct.calcsize(f"={code}")
    return places, at


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_lie_where_the_kernel_looks(kernel: str) -> None:
    parameters, config = KERNELS[kernel]
    places, size = offsets(parameters)
    cpp = parameters.name
    lines = [f"__INTADDR__(&(({cpp}*)0)->{name}) == {at}" for name, at in places.items()]
    lines += [f"sizeof({cpp}) == {size}"]
    compile_asserts(lines, config=config.define(), head=_sources.read()[f"{kernel}.cu"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_configuration_arrives_field_by_field(kernel: str) -> None:
    config: Any = KERNELS[kernel][1]
    usual = type(config)()
    lines = []
    for name, record in (("config", config), (f"{type(config).__name__}{{}}", usual)):
        values = dict(part.split("=") for part in record.define().split(", "))
        assert len(values) == len(fields(record))
        lines += [f"{name}{field} == {value}" for field, value in values.items()]
    assert all(getattr(config, f.name) != getattr(usual, f.name) for f in fields(config))
    if kernel != "merge_states":
        lines.append(f"config.threads() == {config.threads}")
    if kernel == "append_kv":
        lines.append(f"config.share() == {config.share}")
    compile_asserts(lines, config=config.define(), head=_sources.read()[f"{kernel}.cu"])


def test_constants_are_the_same() -> None:
    sources = _sources.read()
    compile_asserts(
        [f"most_parts == {_tool_params.MOST_PARTS}", f"columns == {_tool_params.COLUMNS}"],
        head=sources["merge_states.cu"],
    )
    faults = [f"int32(Fault::{fault.name}) == {fault.value}" for fault in Fault]
    sums = [f"sums == {len(_tool_params.SUMS)}"]
    compile_asserts(faults + sums, head=sources["validate.cu"])


def test_every_number_is_packed_in_its_place() -> None:
    for parameters, _ in KERNELS.values():
        places, size = offsets(parameters)
        start = struct.calcsize(f"={len(parameters.pointers)}Q")
        assert parameters.pointer_bytes.size == start
        values: dict[str, Any] = {}
        for number, (name, code) in enumerate(parameters.numbers.items(), 1):
            count = int(code[:-1])
            values[name] = number if count == 1 else [100 * number + i for i in range(count)]
        packed = bytes(start) + parameters.pack(values)
        assert len(packed) == size
        for name, code in parameters.numbers.items():
            seen = struct.unpack_from(f"={code}", packed, places[name])
            assert list(seen) == (values[name] if len(seen) > 1 else [values[name]])


@pytest.mark.parametrize("parts", [1, 2, _tool_params.MOST_PARTS])
def test_pointers_of_some_parts_lie_among_zeros(parts: int) -> None:
    packer = merge._packer(parts)
    values = range(1, 2 * parts + 5)
    packed = bytearray(b"\xff" * packer.size)
    packer.pack_into(packed, 0, *values)
    assert packer.size == MERGE.pointer_bytes.size
    seen = dict(zip(MERGE.pointers, MERGE.pointer_bytes.unpack(packed), strict=True))
    names = [f"{name}[{part}]" for name in ("outs", "lses") for part in range(parts)]
    wanted = [*names, "carried_out", "carried_lse", "out", "lse"]
    assert seen == dict.fromkeys(MERGE.pointers, 0) | dict(zip(wanted, values, strict=True))


def test_a_number_left_out_is_noticed() -> None:
    with pytest.raises(AssertionError, match="pages"):
        VALIDATE.pack({name: 0 for name in VALIDATE.numbers if name != "pages"})

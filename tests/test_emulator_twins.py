"""The emulator's headers against the kernels' own: same names, same signatures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuattn import _sources
from cuattn.emulator import _build

SHADOWED = sorted(
    name for name in _sources.read() if name.startswith("ptx/") or name == "core/device.cuh"
)
FUNCTION = re.compile(r"^\s*DEVICE (?:constexpr )?([\w:]+) (\w+)\(([^{;]*?)\)[ \w]*(?=[{;])", re.M)


def functions(text: str) -> set[str]:
    """Signatures without parameter names: `void cp_async_16(SharedAddress, const void*, bool)`.

    An array's length is left out: the device has an overload for each.
    """
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    found = set()
    for result, name, parameters in FUNCTION.findall(text):
        parameters = re.sub(r" = [^,]+", "", " ".join(parameters.split()))
        parameters = re.sub(r"\[\w+\]", "[]", parameters)
        types = [re.sub(r"(?<=[*&>\w]) ?\b\w+$", "", p.strip()) for p in parameters.split(",")]
        types = [re.sub(r"\(&\w*\)", "(&)", p) for p in types]
        types = [p or q for p, q in zip(types, parameters.split(","), strict=True)]
        found.add(f"{result} {name}({', '.join(p.strip() for p in types)})")
    return found


@pytest.mark.parametrize("name", SHADOWED)
def test_every_wrapper_has_a_twin(name: str) -> None:
    twin = Path(_build.INCLUDE / name)
    assert twin.is_file(), f"cuattn/emulator/include/ has no {name}"
    wanted = functions(_sources.read()[name])
    assert wanted, f"{name} has no function"
    missing = wanted - functions(twin.read_text())
    assert not missing, f"{name} of the emulator lacks {sorted(missing)}"


@pytest.mark.parametrize(
    "name",
    sorted(p.relative_to(_build.INCLUDE).as_posix() for p in _build.INCLUDE.rglob("*.cuh")),
)
def test_no_twin_without_a_wrapper(name: str) -> None:
    """A function that only the emulator has would compile in CI and nowhere else."""
    helpers = {"shuffle_bits", "round_to_bf16", "round_to_fp16", "flush_to_zero"}
    own = {re.split(r"[ (]", f)[1] for f in functions((_build.INCLUDE / name).read_text())}
    device = {re.split(r"[ (]", f)[1] for f in functions(_sources.read()[name])}
    assert own - helpers <= device, f"only the emulator's {name} has {own - device - helpers}"

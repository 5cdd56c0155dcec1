"""The emulator's instructions against their definitions and against what a GPU gave for them."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from conformance import copies, on_emulator
from conformance.case import Array, Case, compare
from conformance.cases import ALL, FAMILIES, covered, wrappers

from cuattn import emulator

FOLDER = Path(__file__).parent / "fixtures"
MODES = ("late", "early", "random")


@functools.cache
def recorded(family: str) -> dict[str, Array]:
    """What a GPU gave for a family's cases; nothing if it was never asked."""
    path = FOLDER / f"{family}.npz"
    if not path.exists():
        return {}
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def fixture(case: Case) -> dict[str, Array] | None:
    """The case's recorded results, None if there are none."""
    file = recorded(case.family)
    if f"{case.name}/inputs" not in file:
        return None
    digest = str(file[f"{case.name}/inputs"])
    assert digest == case.digest(), (
        f"{case} has other inputs than when it was recorded; run python -m tests.conformance "
        "tests/fixtures on a GPU"
    )
    return {
        name: file[f"{case.name}/{name}"].view(before.dtype).reshape(before.shape)
        for name, before in case.results.items()
    }


@pytest.mark.emulator
@pytest.mark.parametrize("case", ALL, ids=str)
def test_instruction(case: Case) -> None:
    """As NumPy has it and as a GPU had it: exact, or within the case's tolerance."""
    mode = MODES[zlib.crc32(str(case).encode()) % 3]
    results = on_emulator.run(case, mode=mode)
    assert case.expected is not None
    compare(case, results, case.expected(case.inputs))
    seen = fixture(case)
    if seen is not None:
        compare(case, results, seen)


def test_every_wrapper_has_a_case() -> None:
    assert covered() == wrappers()


def test_every_wrapper_is_verified_against_a_gpu() -> None:
    """Skipped with the names of those that are not."""
    proven = {name for case in ALL if fixture(case) is not None for name in case.wrappers.split()}
    missing = sorted(wrappers() - proven)
    if missing:
        pytest.skip(f"unverified, as no results of a GPU are recorded: {', '.join(missing)}")


@pytest.mark.parametrize("family", FAMILIES)
def test_fixture_says_where_it_comes_from(family: str) -> None:
    if not recorded(family):
        pytest.skip(f"tests/fixtures/{family}.npz is not recorded yet")
    about = json.loads(str(recorded(family)["about"]))
    assert {"gpu", "driver", "nvrtc", "commit", "sources", "date"} <= set(about)


REFUSED = {
    "not-16-bytes": ((3, 0), (0, 0), "coordinate 3 of axis 0, which is 6 bytes"),
    "not-16-bytes-in-a-store": ((0, 0), (4, 0), "coordinate 4 of axis 0, which is 8 bytes"),
    "store-before-the-first-row": ((0, 0), (0, -2), "store at coordinate -2 of axis 1"),
    "store-before-the-first-column": ((0, 0), (-8, 0), "store at coordinate -8 of axis 0"),
}


@pytest.mark.emulator
@pytest.mark.parametrize("name", REFUSED)
def test_box_that_a_gpu_refuses(name: str) -> None:
    """An H200 stopped at these with cudaErrorIllegalInstruction."""
    load_at, store_at, words = REFUSED[name]
    case = copies.box_case((40, 9), (16, 5), load_at, store_at, 32)
    with pytest.raises(emulator.EmulatorError, match=words) as caught:
        on_emulator.run(case)
    assert "conformance.cu:" in str(caught.value)


def test_row_narrower_than_its_swizzle_is_refused() -> None:
    """On an H200 it lies otherwise than the pattern says."""
    with pytest.raises(ValueError, match="a row of the box has 64 bytes; wanted 128, the swizzle"):
        emulator.tensor_map(4096, 2, (128, 50), (256,), (32, 64), 128)

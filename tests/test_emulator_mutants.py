"""Faults planted in the real prefill kernel: each must be reported, or change the result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import Case, batched
from conformance import hopper, on_emulator

import cuattn
from cuattn import _sources, emulator

pytestmark = pytest.mark.emulator

# Every call that orders something, in all kernels and what they share.
SYNCHRONISATION = re.compile(
    r"\b((?:sync_block|sync_warp|named_barrier_\w+|cp_async_wait|cp_async_commit|mbarrier_wait"
    r"|mbarrier_arrive\w*|fence_\w+|bulk_commit|bulk_wait\w*|wgmma_fence|wgmma_commit|wgmma_wait)"
    r"(?:<[^>]*>)?)\([^;]*?\);"
)

# Deletions that change nothing, and why: (file, call, number) → reason.
SURVIVORS = {
    ("hopper", "wgmma_wait<0>", 1): "it is reached only when a planted fault took out the first",
}

# Kernels whose threads share nothing but what warp instructions pass on.
WITHOUT = {"append_kv.cu", "merge_states.cu", "validate.cu"}

CALL = batched(Case(lengths=((100, 170),), q_heads=2, kv_heads=1))


@dataclass(frozen=True)
class Outcome:
    """What a call gave, and what its launch did."""

    out: np.ndarray
    counts: emulator.Counts


def launch(sources: _sources.Sources, race: bool = False) -> Outcome:
    with emulator.enabled(race=race, sources=sources) as launches:
        out = cuattn.prefill(*CALL.arrays, **CALL.options)
    return Outcome(out, launches[0])


def error(result: Outcome) -> float:
    worst = np.abs(result.out.astype(np.float64) - CALL.reference().out).max()
    return float(np.nan_to_num(worst, nan=np.inf))


@dataclass(frozen=True)
class Mutant:
    """One synchronisation call taken out of one file."""

    file: str
    call: str
    number: int  # among the file's calls of this name
    span: tuple[int, int]

    def of(self, text: str) -> str:
        return text[: self.span[0]] + ";" + text[self.span[1] :]

    def sources(self) -> dict[str, str]:
        texts = dict(_sources.read())
        return {**texts, self.file: self.of(texts[self.file])}


def mutants(texts: Mapping[str, str]) -> Iterator[Mutant]:
    for file, text in texts.items():
        seen: dict[str, int] = {}
        for match in SYNCHRONISATION.finditer(text):
            call = match.group(1)
            yield Mutant(file, call, seen.get(call, 0), match.span())
            seen[call] = seen.get(call, 0) + 1


def test_unchanged_kernel_is_clean() -> None:
    assert error(launch(_sources.read(), race=True)) < 0.02


KERNELS = {n: t for n, t in _sources.read().items() if not n.startswith(("core/", "ptx/"))}
MUTANTS = list(mutants(KERNELS))
HOPPER = list(mutants({"hopper": hopper.SOURCE}))
REPORT = (
    r"race|never written|in flight|deadlock|without a wgmma.fence|without fence.mbarrier_init"
    r"|no fence.proxy.async|more arrivals|not initialised"
)


def name_of(mutant: Mutant) -> str:
    return f"{mutant.file}-{mutant.call}-{mutant.number}"


def run_mutant(mutant: Mutant) -> None:
    if mutant.file == "hopper":
        on_emulator.run(replace(hopper.case(), source=mutant.of(hopper.SOURCE)), race=True)
    else:
        launch(mutant.sources(), race=True)


@pytest.mark.parametrize("mutant", [*MUTANTS, *HOPPER], ids=name_of)
def test_missing_synchronisation_is_reported(mutant: Mutant) -> None:
    """`hopper` is `conformance/hopper.py`: TMA, mbarriers, wgmma, proxy fences."""
    reason = SURVIVORS.get((mutant.file, mutant.call, mutant.number))
    if reason is not None:
        run_mutant(mutant)
        pytest.xfail(f"survives: {reason}")
    with pytest.raises(emulator.EmulatorError, match=REPORT):
        run_mutant(mutant)


def test_survivors_and_kernels_are_there() -> None:
    known = {(mutant.file, mutant.call, mutant.number) for mutant in (*MUTANTS, *HOPPER)}
    assert known >= SURVIVORS.keys(), "a survivor's call is gone from the sources"
    kernels = {name for name in _sources.read() if name.endswith(".cu")}
    synchronised = {mutant.file for mutant in MUTANTS if mutant.file.endswith(".cu")}
    assert synchronised == kernels - WITHOUT, "a kernel without a synchronisation?"


def planted(file: str, pattern: str, new: str) -> dict[str, str]:
    texts = dict(_sources.read())
    texts[file], times = re.subn(pattern, new, texts[file])
    assert times == 1, f"{file} holds {pattern!r} {times} times, not once"
    return texts


def test_wrong_swizzle_changes_the_result() -> None:
    sources = planted("tile/swizzle.cuh", r"\(column_block % 4\) << 5", "(column_block % 4) << 6")
    try:
        assert error(launch(sources)) > 0.1
    except emulator.EmulatorError as caught:
        assert "ldmatrix" in str(caught)


def test_missing_swizzle_costs_bank_conflicts() -> None:
    sources = planted("tile/swizzle.cuh", r"column \^ \(row % 8\)", "column ^ (row & 0)")
    result = launch(sources)
    assert result.counts.bank_conflicts > 1000
    assert launch(_sources.read()).counts.bank_conflicts == 0


def test_unmasked_tail_changes_the_result() -> None:
    sources = planted("attention/mask.cuh", r"if \(!\w+\.contains\(.*?\)\) ", "if (false) ")
    assert error(launch(sources)) > 0.1


def test_rows_past_the_end_are_out_of_bounds() -> None:
    sources = planted("attention/output.cuh", r"if \(row >= [\w.]+\) continue;", "")
    with pytest.raises(emulator.EmulatorError, match=r'store.* out of bounds: buffer "(lse|out)"'):
        launch(sources, race=True)


def test_keys_past_the_end_are_out_of_bounds() -> None:
    sources = planted("tile/copy.cuh", r"row\.exists && valid\.contains\(index\)", "true")
    with pytest.raises(emulator.EmulatorError, match=r"load of 16 bytes out of bounds"):
        launch(sources)

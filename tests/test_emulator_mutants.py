"""Faults planted in the real attention kernels: each must be reported, or change the result.

g++ takes five to ten seconds for each mutant of Hopper's and of MLA's kernels: those run only when
asked for, by `make mutants`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import Call, Case, batched
from conformance import hopper, on_emulator
from decode_cases import DecodeCase, decode_call, problem_of_decode
from mla_cases import SHORT, MlaCase, mla_call, ones
from test_emulator_decode import ONE, Race
from test_emulator_prefill import card

import cuattn
from cuattn import _heuristics, _sources, emulator

pytestmark = [pytest.mark.emulator, pytest.mark.usefixtures("short_lines")]

# Every call that orders something, in all kernels and what they share.
SYNCHRONISATION = re.compile(
    r"\b((?:sync_block|sync_warp|named_barrier_\w+|cp_async_wait|cp_async_commit|mbarrier_wait"
    r"|mbarrier_arrive\w*|fence_\w+|bulk_commit|bulk_wait\w*|wgmma_fence|wgmma_commit|wgmma_wait)"
    r"(?:<[^>]*>)?)\([^;]*?\);"
)

# Deletions that change nothing, and why: (file, call, number) → reason.
SURVIVORS = {
    (
        "attention/decode_merge.cuh",
        "sync_block",
        0,
    ): "it orders what blocks write to global memory, "
    "and the emulator's blocks run one after the other",
    ("mla_decode_sm80.cu", "sync_block", 5): "the same",
    ("mla_decode_sm90.cu", "named_barrier_sync<2, threads>", 0): "the same",
    ("mla_decode_sm90.cu", "sync_warp", 3): "in the emulator, and of a warp on a GPU, products end "
    "for all threads at once",
    **{
        ("attention/mla_pages.cuh", "sync_warp", i): "lanes that do not load wait for those that "
        "do at the next product, if not here"
        for i in range(4)
    },
    (
        "attention/mla_finder.cuh",
        "sync_warp",
        0,
    ): "lanes are together once more before any of them reads the schedule",
    (
        "attention/prefill_loader.cuh",
        "sync_warp",
        1,
    ): "copies that land before their bytes are asked for do no harm: the phase lasts until the "
    "lane that asks has arrived",
    ("attention/prefill_loader.cuh", "sync_warp", 2): "the same, of Q",
    ("fmha_sm90.cu", "sync_warp", 1): "it keeps lanes from falling behind by two phases of a "
    "barrier, which in no order of the emulator they do",
    ("hopper", "wgmma_wait<0>", 1): "it is reached only when a planted fault took out the first",
}

# Kernels whose threads share nothing but what warp instructions pass on.
WITHOUT = {"append_kv.cu", "merge_splits.cu", "merge_states.cu", "validate.cu"}
# `make mutants` runs them.
SLOW = {
    *("fmha_sm90.cu", "attention/prefill_loader.cuh", "attention/prefill_shared.cuh"),
    *("mla_decode_sm90.cu", "attention/mla_item.cuh", "attention/mla_rows.cuh"),
    *("attention/mla_gather.cuh", "attention/mla_pages.cuh", "attention/mla_finder.cuh"),
    "mla_decode_sm80.cu",
}

CALL = batched(Case(lengths=((100, 170),), q_heads=2, kv_heads=1))
# Many blocks do a whole request and then a part of the long one, of which a warp has several tiles.
DECODE = decode_call(
    DecodeCase(
        lengths=((1, 30), (1, 70), (1, 200), (1, 4000)), q_heads=4, data="structured", scale=0.25
    )
)
# 32 rows: O is longer than a slot, so that it is merged where both slots were.
TALL = decode_call(replace(DECODE.case, q_heads=48))
SMALL = ONE  # few blocks, so that each has several items
OLDER = card("sm_80")
UNLIKE = Case(lengths=((300, 900),), q_heads=2, kv_heads=1, data="structured", scale=0.25)
MASS = {"max_dropped_mass": 0.1, "certificate": True}

# A fault of a kernel must show in one of these; those that show the most come first.
CALLS: dict[str, tuple[Race, ...]] = {
    "fmha_sm80.cu": (Race(CALL, {}, SMALL),),
    "decode.cu": (
        Race(DECODE, {"threshold": 0.01}, SMALL),
        Race(TALL, {}, SMALL),
        Race(DECODE, {"max_dropped_mass": 0.3}, SMALL),
    ),
    "fmha_sm90.cu": (
        Race(batched(UNLIKE), {"threshold": 0.4}, SMALL),  # three warp-groups compute
        Race(batched(replace(CALL.case, lengths=((300, 300),), d_qk=128, d_v=128)), {}, SMALL),
    ),
    "mla_decode_sm90.cu": (
        Race(mla_call(SHORT), MASS),
        Race(mla_call(SHORT), {"threshold": 0.3}),
        Race(mla_call(MlaCase(top_k=512, lengths=ones(500), q_heads=64)), {}, SMALL),
        Race(mla_call(MlaCase(lengths=ones(30, 130, 0, 65, 200), page_size=16)), {}, SMALL),
    ),
    "mla_decode_sm80.cu": (
        Race(mla_call(replace(SHORT, q_heads=64, lengths=ones(400))), MASS, OLDER),
        Race(
            mla_call(MlaCase(top_k=128, lengths=ones(40, 200))),
            {},
            replace(OLDER, multiprocessors=1),
        ),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a call gave, and what its launch did."""

    out: np.ndarray
    counts: emulator.Counts


def launch(
    sources: _sources.Sources, race: bool = False, one: Race = CALLS["fmha_sm80.cu"][0]
) -> Outcome:
    """Run a call with these sources, on what it is planned for."""
    call, skip = one.call, cuattn.SkipSoftmax(**one.skip) if one.skip else None
    with emulator.enabled(race=race, sources=sources, device=one.device) as launches:
        out = getattr(cuattn, call.function)(*call.arrays, **call.options, skip_softmax=skip)
    return Outcome(out[0] if isinstance(out, tuple) else out, launches[0])


def error(result: Outcome, call: Call = CALL) -> float:
    worst = np.abs(result.out.astype(np.float64) - call.reference().out).max()
    return float(np.nan_to_num(worst, nan=np.inf))


@dataclass(frozen=True)
class Mutant:
    """One synchronisation call taken out of one file."""

    file: str
    call: str
    number: int  # among the file's calls of this name
    span: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.file}-{self.call}-{self.number}"

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


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Hopper's prefill kernel, where that is meant."""
    kernel = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernel")
    monkeypatch.setattr(_heuristics, "HOPPER_PREFILL", kernel == "fmha_sm90.cu")


@pytest.mark.parametrize("kernel", CALLS)
def test_unchanged_kernel_is_clean(kernel: str) -> None:
    others = {name for name in KERNELS if name.endswith(".cu")} - {kernel} - WITHOUT
    alone = {name: text for name, text in _sources.read().items() if name not in others}
    for one in CALLS[kernel]:
        result = launch(alone, race=True, one=one)
        assert one.skip or error(result, one.call) < 0.02


@pytest.mark.parametrize("call", [DECODE, TALL], ids=lambda call: call.case.id)
def test_decode_calls_have_splits_and_blocks_of_several_items(call: Call) -> None:
    """Else the end of the loop over items, and the merging of splits, would go unseen."""
    plan = _heuristics.decode(problem_of_decode(call), SMALL)
    lengths = call.arrays[3]
    row_blocks = plan.q_blocks // len(lengths)
    load = row_blocks * int(lengths.sum())
    splits = [plan.geometry.splits.splits(int(n), load) for n in lengths]
    assert splits[-1] > 1
    assert sum(splits) * call.case.kv_heads * row_blocks > plan.grid[0]
    lanes = splits[-1] * plan.geometry.warps
    assert lengths[-1] > 2 * lanes * plan.geometry.block_kv, "no slot is used again"


KERNELS = {n: t for n, t in _sources.read().items() if not n.startswith(("core/", "ptx/"))}
MUTANTS = list(mutants(KERNELS))
HOPPER = list(mutants({"hopper": hopper.SOURCE}))
REPORT = (
    r"race|never written|in flight|deadlock|without a wgmma.fence|without fence.mbarrier_init"
    r"|no fence.proxy.async|more arrivals|not initialised"
)


def included(file: str) -> set[str]:
    """A file and all that it includes."""
    found, left = set(), [file]
    while left:
        found.add(name := left.pop())
        left += set(re.findall(r"#include <(.+)>", KERNELS.get(name, ""))) - found
    return found


# What is shared is run with every kernel that includes it; with slow ones only if they alone do.
RUNS = [
    *(
        pytest.param(mutant, kernel, marks=pytest.mark.slow if mutant.file in SLOW else ())
        for kernel in CALLS
        for mutant in MUTANTS
        if mutant.file in included(kernel) and (kernel in SLOW) == (mutant.file in SLOW)
    ),
    *(pytest.param(mutant, "hopper") for mutant in HOPPER),
]


def run_mutant(mutant: Mutant, kernel: str) -> None:
    if kernel == "hopper":
        on_emulator.run(replace(hopper.case(), source=mutant.of(hopper.SOURCE)), race=True)
        return
    for one in CALLS[kernel]:
        launch(mutant.sources(), race=True, one=one)


@pytest.mark.parametrize(
    ("mutant", "kernel"), RUNS, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_missing_synchronisation_is_reported(mutant: Mutant, kernel: str) -> None:
    """`hopper` is `conformance/hopper.py`: TMA, mbarriers, wgmma, proxy fences."""
    reason = SURVIVORS.get((mutant.file, mutant.call, mutant.number))
    if reason is not None:
        run_mutant(mutant, kernel)
        pytest.xfail(f"survives: {reason}")
    with pytest.raises(emulator.EmulatorError, match=REPORT):
        run_mutant(mutant, kernel)


def test_survivors_and_kernels_are_there() -> None:
    known = {(mutant.file, mutant.call, mutant.number) for mutant in (*MUTANTS, *HOPPER)}
    assert known >= SURVIVORS.keys(), "a survivor's call is gone from the sources"
    kernels = {name for name in _sources.read() if name.endswith(".cu")}
    synchronised = {mutant.file for mutant in MUTANTS if mutant.file.endswith(".cu")}
    assert synchronised == kernels - WITHOUT, "a kernel without a synchronisation?"
    assert {run.values[0] for run in RUNS} == {*MUTANTS, *HOPPER}, "a mutant that no call runs"


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
    sources = planted("attention/prefill_rows.cuh", r"if \(!row.exists\) continue;", "")
    with pytest.raises(emulator.EmulatorError, match=r'store.* out of bounds: buffer "(lse|out)"'):
        launch(sources, race=True)


def test_keys_past_the_end_are_out_of_bounds() -> None:
    sources = planted("tile/copy.cuh", r"valid\.contains\(index\) && exists", "true")
    with pytest.raises(emulator.EmulatorError, match=r"load of 16 bytes out of bounds"):
        launch(sources)

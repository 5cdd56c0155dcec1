"""validate: the first offender in one sentence, and nothing to say of what a call may hold."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import _check_tools, _ingest, _validate, emulator

BATCH, MAX_PAGES, PAGES, PAGE_SIZE = 5, 40, 300, 8


def good() -> dict[str, Any]:
    """Arguments with nothing wrong; what no call would read is garbage."""
    seq_lens = np.array([320, 0, 1, 8, 77], np.int32)
    tables = np.full((BATCH, MAX_PAGES), -7, np.int32)
    for request, length in enumerate(seq_lens):
        count = -(-length // PAGE_SIZE)
        tables[request, :count] = (np.arange(count) * 7 + request) % PAGES
    return {
        "kv_cache": np.zeros((PAGES, 2, 1, PAGE_SIZE, 8), np.float16),
        "block_tables": tables,
        "seq_lens": seq_lens,
        "cu_seqlens_q": np.array([0, 3, 3, 4, 12, 20], np.int32),
        "q": np.zeros((24, 1, 8), np.float16),
    }


def run(device: Any, given: dict[str, Any]) -> None:
    def to(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to, value))
        return device.to_device(value) if isinstance(value, np.ndarray) else value

    assert cuattn.validate(**{name: to(value) for name, value in given.items()}) is None


def test_nothing_wrong(device: Any) -> None:
    run(device, good())


# What is put where, all of it at once, and what is said.
OFFENDERS: list[tuple[list[tuple[str, Any, int]], str]] = [
    (
        [("block_tables", (3, 0), 90210)],
        "block_tables[3, 0] is 90210; wanted a page from 0 to 299",
    ),
    ([("block_tables", (0, 39), -1)], "block_tables[0, 39] is -1; wanted a page from 0 to 299"),
    ([("block_tables", (0, 31), PAGES)], "block_tables[0, 31] is 300; wanted a page from 0 to 299"),
    (
        [("block_tables", (0, entry), 1000 + entry) for entry in (37, 33, 5, 32)]
        + [("block_tables", (2, 0), -1)],
        "block_tables[0, 5] is 1005; wanted a page from 0 to 299",
    ),
    (
        [("block_tables", (4, 9), -(2**31))],
        "block_tables[4, 9] is -2147483648; wanted a page from 0 to 299",
    ),
    ([("seq_lens", 2, -5)], "seq_lens[2] is -5; wanted 0 to 320 (max_pages × page_size)"),
    ([("seq_lens", 4, 321)], "seq_lens[4] is 321; wanted 0 to 320 (max_pages × page_size)"),
    (
        [("seq_lens", 3, 2**31 - 1), ("block_tables", (4, 0), -1)],
        "seq_lens[3] is 2147483647; wanted 0 to 320 (max_pages × page_size)",
    ),
    (
        [("cu_seqlens_q", 4, 2), ("seq_lens", 4, -1)],
        "cu_seqlens_q[4] is 2, below cu_seqlens_q[3] = 4; wanted a non-decreasing sequence from 0 "
        "to q's 24 tokens",
    ),
    ([("cu_seqlens_q", 0, 1), ("seq_lens", 0, -1)], "cu_seqlens_q[0] is 1; wanted 0"),
    ([("cu_seqlens_q", 5, 25)], "cu_seqlens_q[5] is 25; wanted at most q's 24 tokens"),
    (
        [("seq_lens", 1, -1), ("cu_seqlens_q", 4, 0), ("block_tables", (0, 39), 512)],
        "block_tables[0, 39] is 512; wanted a page from 0 to 299",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), OFFENDERS, ids=[s for _, s in OFFENDERS])
def test_the_first_offender_is_named(device: Any, changes: Any, sentence: str) -> None:
    given = good()
    for name, where, value in changes:
        given[name][where] = value
    with pytest.raises(ValueError) as caught:
        run(device, given)
    assert str(caught.value) == sentence


def test_bounds_are_legal(device: Any) -> None:
    given = good()
    given["block_tables"][0, :2] = 0, PAGES - 1
    given["block_tables"][4, :5] = given["block_tables"][0, :5]  # a shared prefix
    given["cu_seqlens_q"][5] = 24
    run(device, given)


@pytest.mark.parametrize("batch", [0, 1, 33, 1000])
def test_any_number_of_requests(device: Any, batch: int) -> None:
    given = {
        "kv_cache": np.zeros((9, 2, 1, 8, 8), np.float16),
        "block_tables": np.full((batch, 3), 8, np.int32),
        "seq_lens": np.full(batch, 24, np.int32),
    }
    run(device, given)
    if batch:
        given["block_tables"][batch - 1, 2] = 9
        with pytest.raises(ValueError, match=rf"block_tables\[{batch - 1}, 2\] is 9; wanted"):
            run(device, given)


@pytest.mark.parametrize(
    ("cache", "layout"),
    [
        (np.zeros((9, 2, 3, 16, 8), np.float16), "HND"),
        (np.zeros((9, 2, 16, 3, 8), np.float16), "NHD"),
        ((np.zeros((9, 3, 16, 8), np.float16), np.zeros((9, 3, 16, 16), np.float16)), "HND"),
        ((np.zeros((9, 16, 3, 8), np.float16), np.zeros((9, 16, 3, 16), np.float16)), "NHD"),
        (np.zeros((9, 16, 576), np.uint8), "HND"),
        (np.zeros((9, 1, 16, 576), np.uint8), "HND"),
        (np.zeros((9, 16, 1, 576), np.uint8), "NHD"),
    ],
    ids=["HND", "NHD", "pair", "pair-NHD", "MLA", "MLA-HND", "MLA-NHD"],
)
def test_caches_of_every_form(device: Any, cache: Any, layout: str) -> None:
    given = {"kv_cache": cache, "layout": layout}
    given["block_tables"] = np.array([[8, 9]], np.int32)
    given["seq_lens"] = np.array([16], np.int32)
    run(device, given)
    given["seq_lens"] += 1
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] is 9; wanted a page from 0 to 8"):
        run(device, given)


def test_ragged_prefix_sums(device: Any) -> None:
    given = {
        "cu_seqlens_q": np.array([0, 3, 8], np.int32),
        "cu_seqlens_kv": np.array([0, 30, 29], np.int32),
        "k": np.zeros((50, 1, 8), np.float16),
    }
    with pytest.raises(ValueError, match=r"cu_seqlens_kv\[2\] is 29, below .* to k's 50 tokens$"):
        run(device, given)
    del given["k"]
    with pytest.raises(ValueError, match=r"cu_seqlens_kv\[2\] is 29, below .* from 0$"):
        run(device, given)
    given["cu_seqlens_kv"][2] = 2**31 - 1
    run(device, given)


@pytest.mark.parametrize("each", [None, 1, 4])
def test_lengths_include_the_new_tokens(device: Any, each: int | None) -> None:
    given = good()
    del given["cu_seqlens_q"], given["q"]
    if each is None:
        given["cu_seqlens_new"] = np.array([0, 3, 3, 5, 5, 6], np.int32)
        wanted = r"seq_lens\[2\] is 1, below the request's 2 new tokens"
    else:
        shape = (BATCH, 1, 8) if each == 1 else (BATCH, each, 1, 8)
        given["k_new"] = np.zeros(shape, np.float16)
        wanted = rf"seq_lens\[1\] is 0, below the request's {each} new tokens"
    with pytest.raises(ValueError, match=wanted):
        run(device, given)


GIVEN: list[tuple[dict[str, Any], str]] = [
    ({"kv_cache": None}, "wanted all of them"),
    ({"seq_lens": None}, "wanted all of them"),
    ({"block_tables": None}, "wanted all of them"),
    (dict.fromkeys(("block_tables", "seq_lens", "cu_seqlens_q")), "nothing was given to check"),
    ({"kv_cache": np.zeros((9, 2, 1, 12, 8))}, "page size 12; wanted a power of two"),
    ({"kv_cache": np.zeros((9, 3, 1, 8, 8))}, r"wanted 5 axes \[pages, 2, …\]"),
    ({"kv_cache": np.zeros((9, 8))}, r"kv_cache has shape \(9, 8\); wanted \[pages, 2, …\]"),
    ({"layout": "BHD"}, "layout is 'BHD'; wanted 'HND' or 'NHD'"),
    ({"seq_lens": np.zeros(4, np.int32)}, r"seq_lens has shape \(4,\); wanted \[5\]"),
    ({"seq_lens": np.zeros(5, np.int64)}, "seq_lens is int64; wanted int32"),
    ({"cu_seqlens_q": np.zeros(5, np.int32)}, "cu_seqlens_q has 5 elements; wanted 6"),
    ({"q": "tokens"}, "q is a str; wanted an array"),
]


@pytest.mark.parametrize(("change", "sentence"), GIVEN, ids=[s for _, s in GIVEN])
def test_arguments_are_checked_first(device: Any, change: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        run(device, good() | change)


def run_races(**options: Any) -> None:
    """Every branch of the kernel."""
    from conftest import Emulated

    with emulator.enabled(**options):
        run(Emulated(), good())
        for changes, sentence in OFFENDERS:
            test_the_first_offender_is_named(Emulated(), changes, sentence)
        test_lengths_include_the_new_tokens(Emulated(), None)
        test_lengths_include_the_new_tokens(Emulated(), 4)


@pytest.mark.emulator
@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_in_race_mode(schedule: Any) -> None:
    run_races(race=True, schedule=schedule)


# --- the check before a call ---------------------------------------------------------------------


def test_a_calls_views_are_checked(device: Any) -> None:
    """As `_call.attend` has them: views by the names of its form."""
    given = good()
    arrays = {name: device.to_device(given[name]) for name in given}
    cache = arrays.pop("kv_cache")
    names = ("q", *_check_tools.CACHES, "block_tables", "seq_lens", "cu_seqlens_q")
    arrays |= dict(zip(_check_tools.CACHES, (cache[:, 0], cache[:, 1]), strict=True))
    views = [_ingest.view(arrays[name], name) for name in names]
    _validate.check_call(names, views, "HND", None)
    arrays["seq_lens"][3] = -4
    with pytest.raises(ValueError, match=r"seq_lens\[3\] is -4"):
        _validate.check_call(names, views, "HND", None)
    _validate.check_call(names[:3], views[:3], None, None)  # no tables: nothing to check


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("0", False), ("", False), (None, False)]
)
def test_the_environment_is_read_at_import(value: str | None, wanted: bool) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "CUATTN_CHECK"}
    if value is not None:
        environment["CUATTN_CHECK"] = value
    code = "from cuattn import _validate; print(_validate.checking)"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True).strip() == str(value == "1")


def test_in_a_capture_it_refuses_and_calls_go_unchecked(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    monkeypatch.setattr(_validate, "checking", True)
    given = good()
    given["seq_lens"][3] = -4
    names = ("kv_cache", "block_tables", "seq_lens")
    cache, tables, lengths = (gpu.to_device(given[name]) for name in names)
    new = cupy.zeros((BATCH, 1, 8), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] is 0, below"):
        cuattn.append_kv(cache, new, new, tables, lengths)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capture of a graph"):
                cuattn.validate(cache, tables, lengths)
            cuattn.append_kv(cache, new, new, tables, lengths)
        finally:
            stream.end_capture()

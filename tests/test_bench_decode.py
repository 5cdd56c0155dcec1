"""The benchmarks of paged caches with the emulator in place of a GPU, and their inputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_demo import fake_cupy

import cuattn
from benchmarks import __main__ as command
from benchmarks import (
    ceilings,
    decode,
    decode_peers,
    decode_skip,
    forms,
    mla,
    report,
    shapes,
    timing,
)
from cuattn import _device, emulator, reference
from cuattn._workloads import Size
from cuattn._workloads_paged import (
    PagedInputs,
    PagedSize,
    TileSums,
    by_token,
    exact_tokens,
    iid_paged,
    rows_of,
    structured_paged,
)

SIZE = PagedSize((70, 33), 8, 2, page=16, head_dim=64)


def on_reference(inputs: PagedInputs, size: PagedSize) -> Any:
    """Dense results in float64, shaped like q."""
    q, cache, tables, lengths = inputs
    ends = np.arange(size.batch + 1) * size.q_len
    flat = q.reshape(-1, size.q_heads, size.head_dim)
    return reference.prefill_paged(flat, cache, tables, lengths, ends).out.reshape(q.shape)


@pytest.mark.parametrize("make", [iid_paged, structured_paged], ids=["w0", "w1"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_paged_inputs_and_their_exact_rows(make: Any, q_len: int) -> None:
    size = PagedSize((70, 33), 8, 2, page=16, q_len=q_len, head_dim=64)
    inputs = make(size)
    assert inputs.cache.shape == (8, 2, 2, 16, 64)
    assert sorted(inputs.tables[inputs.tables >= 0]) == list(range(8))
    assert rows_of(inputs, 1, 1, 0).shape == (33, 64)
    assert np.array_equal(inputs.cache.view("u2"), make(size).cache.view("u2"))
    exact, out = exact_tokens(inputs), on_reference(inputs, size)
    assert {(request, head) for request, head, *_ in exact.places} == {
        *((0, 0), (0, 7), (1, 0), (1, 7))
    }
    assert exact.error(by_token(inputs, out)) < 1e-12
    assert exact.error(by_token(inputs, -out)) > 1


def test_bytes_count_everything_once() -> None:
    assert SIZE.cache_bytes == 103 * 2 * 2 * 64 * 2
    assert SIZE.bytes == SIZE.cache_bytes + 2 * 2 * 8 * 64 * 2
    assert str(SIZE) == "2×33…70 8/2 page 16"


def test_structured_heads_want_room() -> None:
    with pytest.raises(ValueError, match="head_dim of 48"):
        structured_paged(PagedSize((64,), 1, 1, head_dim=48))


def test_skipping_by_split_alone() -> None:
    """Four tiles in two splits; the vote of two rows; the first of a split stays."""
    maximum = np.array([[[0, -1, 0, -9], [0, -9, 0, -9]]], np.float32)
    sums = TileSums(maximum, np.full(maximum.shape, 0.25))
    rates, dropped = sums.skip_alone(np.array([0.0, 0.1, 0.5]), 2)
    assert rates.tolist() == [0, 0.25, 0.5]
    assert dropped[:, 0].tolist() == [[0, 0], [0.25, 0.25], [0.5, 0.5]]


def test_tile_sums_are_those_of_the_softmax() -> None:
    inputs = structured_paged(PagedSize((75, 75), 4, 2, page=16, head_dim=64))
    sums = TileSums.of(inputs, 32)
    assert sums.maximum.shape == (4, 2, 3)
    scores = rows_of(inputs, 0, 1, 0).astype(float) @ inputs.q[1, 1].astype(float) / 8
    weights = np.exp(scores - scores.max())
    assert sums.maximum[2, 1, 2] == pytest.approx(scores[64:].max(), rel=1e-5)
    assert sums.mass[2, 1, 0] == pytest.approx(weights[:32].sum() / weights.sum(), rel=1e-4)


def test_figures_at_a_mass_lie_between_rows() -> None:
    rows = [report.Row("g", "n", "i", ms=ms, dropped_mass=m) for ms, m in ((1, 1e-1), (3, 1e-3))]
    assert decode_skip.at_mass(rows, "ms", 1e-2) == pytest.approx(2)
    assert decode_skip.at_mass(rows, "ms", 1e-4) is None
    assert decode_skip.at_mass(rows, "skip_rate") is None


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], tuple[int, list[dict[str, Any]]]]]:
    """Run a group on tiny cases in the emulator, and read its rows."""
    cupy: Any = fake_cupy()
    for name in ("exp", "full", "inf"):
        setattr(cupy, name, getattr(np, name))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(ceilings, "_multiply", lambda group, watch: None)
    monkeypatch.setattr(timing, "GRAPH_CALLS", 2)
    monkeypatch.setattr(timing, "capture", lambda runs: lambda: None)
    monkeypatch.setattr(decode, "DECODE", (shapes.Decode("a", SIZE, 100.0),))
    sweep = shapes.DecodeSweep("b", "w1", shapes.paged(1, 1024, 4, 1), (0.0, 1e-3, 0.9), (0.05,))
    monkeypatch.setattr(decode_skip, "DECODE_SKIP", (sweep,))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(_device, "count", lambda: 1)
    monkeypatch.setattr(_device, "current", lambda: 0)
    monkeypatch.setattr(_device, "describe", lambda ordinal: _device.EMULATOR)

    def run(group: str) -> tuple[int, list[dict[str, Any]]]:
        status = command.main([group, "--commit", "abc"])
        return status, json.loads((tmp_path / f"{group}.json").read_text("utf-8"))["rows"][2:]

    with emulator.enabled():
        yield run


@pytest.mark.emulator
def test_decode_lines_and_rows(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    makers = {
        "good": lambda inputs, size, caches: [lambda: on_reference(inputs, size)],
        "wrong": lambda inputs, size, caches: [lambda: inputs.q],
    }
    monkeypatch.setattr(decode_peers, "available", lambda flashinfer, size: makers)
    status, rows = bench("decode")
    assert status == 0
    ours, good, wrong = rows
    assert (ours["impl"], ours["kernel"], ours["ms"]) == ("cuattn", "decode", 1000.0)
    assert ours["gbps"] == pytest.approx(SIZE.bytes * 1e-9)
    assert ours["rel_error"] < 1e-2
    assert good["ms"] == 1000.0 and wrong["ms"] is None
    text = capsys.readouterr().out
    assert "1.00x good" in text and "wrong is wrong on a" in text


@pytest.mark.emulator
def test_a_single_request_is_also_timed_in_a_graph(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = shapes.paged(1, 40, 4, 2, page=16)
    monkeypatch.setattr(decode, "DECODE", (shapes.Decode("a", size),))
    monkeypatch.setattr(timing, "BEYOND_L2", 3 * size.cache_bytes)
    _, rows = bench("decode")
    assert [(row["impl"], row["ms"]) for row in rows] == [
        ("cuattn", 1000.0),
        ("cuattn_graph", 1000.0 / 3),
    ]


@pytest.mark.emulator
def test_decode_skip_lines_and_rows(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = bench("decode_skip")
    assert status == 0
    ours = [row for row in rows if row["impl"] == "cuattn"]
    assert [row["threshold"] for row in ours] == [None, 0, 1e-3, 0.9, None]
    assert [row["max_dropped_mass"] for row in ours] == [None] * 4 + [0.05]
    assert ours[1]["skip_rate"] == 0 < ours[2]["skip_rate"] < ours[3]["skip_rate"]
    assert 0 < ours[3]["dropped_mass"] < ours[3]["worst_mass"]
    assert ours[4]["worst_mass"] <= 0.05
    alone = [row for row in rows if row["impl"] == decode_skip.REPLAYED]
    assert [row["threshold"] for row in alone] == [1e-3, 0.9]
    assert all(row["ms"] is None for row in alone)
    assert "ε 0.05" in capsys.readouterr().out


@pytest.mark.emulator
def test_decode_skip_notices_what_the_mass_does_not_explain(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cuattn.decode

    def wrong(*arrays: Any, skip_softmax: Any = None, **options: Any) -> Any:
        result = right(*arrays, skip_softmax=skip_softmax, **options)
        if skip_softmax is not None:
            options["out"][...] = -options["out"]
        return result

    monkeypatch.setattr(cuattn, "decode", wrong)
    status, rows = bench("decode_skip")
    assert status == 1
    assert [row["ms"] for row in rows if row["impl"] == "cuattn"][1:] == [None] * 4
    text = capsys.readouterr().out
    assert "bit for bit" in text and "beyond what was left out" in text


@pytest.mark.emulator
def test_lines_and_rows_of_forms(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(2, 64, 2, 1, 64, 64)
    monkeypatch.setattr(forms, "FORMS", (shapes.Shape("a", size, True, 100.0),))
    chunk = shapes.Chunk("b", shapes.paged(2, 40, 4, 2, q_len=3))
    monkeypatch.setattr(forms, "CHUNKS", (chunk,))
    status, rows = bench("forms")
    assert status == 0
    names = ["cuattn", "cuattn_ragged", "cuattn_paged_16", "cuattn_paged_64", "cuattn"]
    assert [row["impl"] for row in rows] == names
    assert all(row["ms"] == 1000.0 and row["rel_error"] < 1e-2 for row in rows)
    assert {row["kernel"] for row in rows} == {"fmha_sm80"}
    assert rows[0]["tflops"] == pytest.approx(2 * 2 * 64 * 64 * 128 * 1e-12)
    assert rows[4]["tflops"] == pytest.approx(2 * 4 * (38 + 39 + 40) * 512 * 1e-12)
    assert "2×40 4/2 3 tokens, page 64" in capsys.readouterr().out


@pytest.mark.emulator
def test_mla_lines_and_rows(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = shapes.Mla("a", 2, 70, 64, best=100.0)
    monkeypatch.setattr(mla, "MLA", (shape,))
    monkeypatch.setattr(mla, "MLA_SKIP", {})
    status, (row,) = bench("mla")
    assert status == 0
    assert (row["impl"], row["kernel"], row["ms"]) == ("cuattn", "mla_decode_sm90", 1000.0)
    assert row["tflops"] == pytest.approx(2 * 2 * 70 * 64 * 1088 * 1e-12)
    assert row["gbps"] == pytest.approx((2 * 70 * 1152 + 2 * 64 * 1088 * 2) * 1e-9)
    assert row["rel_error"] < 1e-2
    assert "2×70 64 heads" in capsys.readouterr().out


def test_sparse_positions_are_those_of_the_request() -> None:
    shape = shapes.Mla("a", 3, 200, 16, q_len=2, top_k=64)
    inputs = mla._inputs(shape, np)
    assert inputs.sparse.shape == (3, 2, 64)
    for request, positions in enumerate(inputs.sparse):
        assert set((positions // mla.PAGE).flat) <= set(inputs.tables[request].tolist())
        assert all(len(set(row.tolist())) == 64 for row in positions)


def test_named_shapes_have_one_name_each() -> None:
    cases = (*shapes.DECODE, *shapes.DECODE_SKIP, *shapes.MLA, *shapes.CHUNKS)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {*shapes.QUICK_DECODE, *shapes.QUICK_DECODE_SKIP, *shapes.QUICK_MLA} <= set(names)
    assert set(shapes.MLA_SKIP) <= set(names)
    assert len(shapes.ragged_lengths()) == 64

"""The demonstration and the benchmarks, with a stand-in for the GPU: NumPy and the reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import missing_gpu
from numpy.typing import NDArray

import cuattn
from benchmarks import __main__ as command
from benchmarks import first_call, host, peers, prefill, report, shapes, skip
from cuattn import _demo, _device, _ingest, _workloads, _workspace, reference
from cuattn._records import Device, Geometry
from cuattn._workloads import Size

Array = NDArray[Any]

GEOMETRY = Geometry(block_q=32, block_kv=16, rows_per_vote=16)
SMALL = ["--seq", "128", "--heads", "2", "--head-dim", "64"]


class DeviceArray(np.ndarray[Any, Any]):
    """A NumPy array with what CuPy's have beside it."""

    def get(self) -> Array:
        return np.array(self)

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(
            memset_async=lambda value, size: None,
            copy_from_device_async=lambda source, size: None,
        )


class Event:
    """Everything takes a second, so that nothing is run often."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class SkipSoftmax:
    threshold: float
    unsafe: bool = False
    stats: Any = None
    threshold_scale_factor: None = None
    seeds: None = None


class SkipStats:
    rate = 0.0


class FakeGpu:
    """Replays calls with the reference; `broken` spoils the result of a call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.broken: Callable[[Any], bool] = lambda skip: False

    def prefill(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        skip_softmax: SkipSoftmax | None = None,
        return_lse: bool = False,
        out: Array | None = None,
        lse: Array | None = None,
    ) -> Any:
        self.calls.append(skip_softmax)
        result = reference.prefill(
            *(np.asarray(x) for x in (q, k, v)),
            causal=causal,
            skip_softmax=skip_softmax,
            geometry=GEOMETRY,
        )
        values = result.out.astype(q.dtype)
        if self.broken(skip_softmax):
            values = -values
        if skip_softmax is not None and skip_softmax.stats is not None:
            assert (skip_softmax.threshold >= 1) == skip_softmax.unsafe
            skip_softmax.stats.rate = float(result.skipped.sum() / result.visited.sum())
        if out is None:
            out = np.empty_like(values).view(DeviceArray)
        out[...] = values
        return (out, result.lse.astype(np.float32)) if return_lse else out


def fake_cupy() -> ModuleType:
    module = ModuleType("cupy")
    for name in ("arange", "expm1", "maximum", "random", "asarray", "zeros", "uint64", "where"):
        setattr(module, name, getattr(np, name))
    for name in ("uint8", "uint16", "uint32", "int32", "float32"):
        setattr(module, name, getattr(np, name))
    made: Any = module
    made.__version__ = "14"
    made.ndarray = np.ndarray
    made.arange = lambda *a, **o: np.arange(*a, **o).view(DeviceArray)
    made.empty = lambda *a, **o: np.empty(*a, **o).view(DeviceArray)
    made.empty_like = lambda x: np.empty_like(x).view(DeviceArray)
    made.RawKernel = lambda code, name: lambda grid, block, arguments: None
    made.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    made.cuda = SimpleNamespace(
        Event=Event,
        get_elapsed_time=lambda start, end: 1000.0,
        Device=lambda: SimpleNamespace(attributes={"MultiProcessorCount": 132}),
        Stream=lambda **_: SimpleNamespace(ptr=0),
        runtime=SimpleNamespace(deviceSynchronize=lambda: None),
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
    )
    return module


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    for name, value in (
        ("prefill", fake.prefill),
        ("decode", lambda q, *_, out=None, **__: q if out is None else out),
        ("SkipSoftmax", SkipSoftmax),
        ("SkipStats", SkipStats),
    ):
        monkeypatch.setattr(cuattn, name, value, raising=False)
    device = Device(0, "Stand-in", (9, 0), "sm_90a", 132, 232448)
    monkeypatch.setattr(_device, "count", lambda: 1)
    monkeypatch.setattr(_device, "current", lambda: 0)
    monkeypatch.setattr(_device, "describe", lambda ordinal: device)
    plan = SimpleNamespace(kernel="fmha_test", geometry=GEOMETRY)
    monkeypatch.setattr(_workloads, "plan_of", lambda *_, **__: plan)
    monkeypatch.setattr(prefill, "plan_of", lambda *_, **__: plan)
    yield fake


def table(text: str) -> list[list[str]]:
    """Lines of the demo's table, cells apart."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["dense"])
    return [line.split() for line in lines[first : lines.index("", first)]]


def test_demo_on_a_gpu(card: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    assert _demo.main([*SMALL, "--thresholds", "0,0.1,1.5", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "Stand-in, sm_90a" in text
    rows = table(text)
    assert [row[0] for row in rows] == ["dense", "0", "0.1", "1.5"]
    assert {len(row) for row in rows} == {9}
    assert all(row[1] == "1000.000" and row[3] == "1.00x" for row in rows)
    skipped = [float(row[5].rstrip("%")) for row in rows]
    assert skipped[:2] == [0, 0]
    assert 0 < skipped[2] < skipped[3]
    assert "bit for bit: yes" in text
    if _has_matplotlib():
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "No picture" in text


def test_demo_times_nothing_that_is_wrong(
    card: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    card.broken = lambda skip: True
    assert _demo.main(SMALL) == 1
    assert "The dense output is wrong" in capsys.readouterr().out
    assert card.calls == [None]


def test_demo_says_when_zero_is_not_dense(
    card: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    card.broken = lambda skip: skip is not None
    assert _demo.main([*SMALL, "--thresholds", "0"]) == 1
    assert "bit for bit: NO" in capsys.readouterr().out


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise RuntimeError("no CUDA device can be used")

    monkeypatch.setattr(_device, "count", refuse)


@pytest.mark.emulator
def test_demo_without_a_gpu(
    no_card: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The emulator: errors of bfloat16, skips counted by the kernel, no times."""
    picture = tmp_path / "demo.svg"
    arguments = ["--seq", "512", "--heads", "2", "--head-dim", "64", "--kv-heads", "1", "--full"]
    assert _demo.main([*arguments, "--thresholds", "0,0.9", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "this is the emulator" in text and "no times" in text
    assert "2 heads over 1 KV heads" in text
    rows = table(text)
    assert [row[0] for row in rows] == ["dense", "0", "0.9"]
    assert {len(row) for row in rows} == {5}
    assert 1e-4 < float(rows[0][-1]) < _demo.TOLERANCE
    assert float(rows[1][1].rstrip("%")) == 0 < float(rows[2][1].rstrip("%"))
    assert "bit for bit: yes" in text
    assert picture.exists() == _has_matplotlib()


def test_demo_without_gpu_and_compiler(
    no_card: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_demo.shutil, "which", lambda name: None)
    assert _demo.main([]) == 1
    assert "wants g++ 12 or later" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "0"], "0 is not a positive number"),
        (["--thresholds", "0.1,-1"], "0.1,-1 has a threshold"),
        (["--thresholds", "nan"], "nan has a threshold"),
        (["--workload", "w9"], "invalid choice: 'w9'"),
    ],
)
def test_demo_names_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_names_heads_that_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo.main(["--heads", "4", "--kv-heads", "3"]) == 2
    assert "--kv-heads is 3, which does not divide --heads 4" in capsys.readouterr().out


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_skipped_tiles_are_those_of_the_reference(causal: bool) -> None:
    inputs = _workloads.structured(Size(1, 200, 1, 1, 64, 64), dtype=np.float32)
    q, k, v = (x[0] for x in inputs)
    tiles = _demo.skipped_tiles(q, k, v, causal, GEOMETRY, 0.1)
    result = reference.attention(q, k, v, causal=causal, skip=0.1, geometry=GEOMETRY)
    assert tiles.shape == (13, 13)
    assert np.nansum(tiles) == result.skipped[0] > 0
    assert np.isfinite(tiles).sum() == result.visited[0]
    assert (tiles[:, 0] == 0).all()


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


TINY = shapes.Shape("tiny_causal", Size(2, 64, 4, 2, 64, 32), True, 500.0)
SWEEPS = (
    shapes.Sweep(
        "w0_full", "w0", Size(1, 256, 2, 1, 64, 64), False, (0.0, 1e-30, 1.0), (3000, 2000, 1000)
    ),
    shapes.Sweep("w1_causal", "w1", Size(1, 128, 2, 1, 64, 64), True, (0.0, 0.1)),
)


@pytest.fixture
def bench(
    card: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[int, dict[str, Any]]]]:
    """Run the command on tiny cases and read what it wrote."""
    monkeypatch.setattr(prefill, "PREFILL", (TINY,))
    monkeypatch.setattr(skip, "SKIP", SWEEPS)
    monkeypatch.setattr(prefill.ceilings, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(prefill.ceilings, "_multiply", _matrix_row)
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(_workspace, "partials", lambda sizes, device, stream: (0, 0, 0))
    monkeypatch.setattr(_ingest, "view", lambda x, name: x)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    peer = {
        "good": lambda inputs, causal: lambda: reference.prefill(*inputs, causal=causal).out,
        "wrong": lambda inputs, causal: lambda: np.zeros((2, 64, 4, 32)),
        "unable": _refuse,
    }
    monkeypatch.setattr(peers, "available", lambda flashinfer: peer)

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = command.main(arguments)
        path = tmp_path / f"{arguments[0]}.json"
        return status, json.loads(path.read_text("utf-8")) if path.exists() else {}

    yield run


def _matrix_row(group: str, watch: Any) -> report.Row:
    return report.Row(group, "ceiling_matrix_8192", "torch", ms=1.0, tflops=800.0)


def _refuse(inputs: Any, causal: bool) -> Any:
    raise RuntimeError("no kernel for this\nand a long trace")


def test_prefill_lines_and_rows(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = bench("prefill", "--commit", "abc")
    assert status == 0
    assert list(results["meta"]) == [
        *("gpu", "driver", "cupy", "nvrtc", "commit", "date", "command"),
    ]
    assert results["meta"]["commit"] == "abc"
    rows = {row["impl"]: row for row in results["rows"] if row["name"] == TINY.name}
    assert list(rows["cuattn"]) == [
        *("group", "name", "impl", "kernel", "ms", "tflops", "gbps", "threshold", "skip_rate"),
        *("dropped_mass", "rel_error", "worst_mass", "max_dropped_mass"),
    ]
    assert rows["cuattn"]["kernel"] == "fmha_test"
    assert rows["cuattn"]["tflops"] == pytest.approx(TINY.size.flops(True) * 1e-12)
    assert rows["good"]["ms"] == 1000.0
    assert rows["wrong"]["ms"] is None
    assert rows["wrong"]["rel_error"] == pytest.approx(1.0)
    assert rows["unable"]["ms"] is None
    text = capsys.readouterr().out
    assert "wrong is wrong on tiny_causal" in text
    assert "unable cannot do tiny_causal: no kernel for this\n" in text
    assert "1.00x good" in text
    names = [row["name"] for row in results["rows"][:3]]
    assert names == ["ceiling_copy", "ceiling_read", "ceiling_matrix_8192"]


def test_a_wrong_result_of_ours_gets_no_figure(bench: Any, card: FakeGpu) -> None:
    card.broken = lambda skip: True
    status, results = bench("prefill")
    ours = [row for row in results["rows"] if row["impl"] == "cuattn"]
    assert status == 1
    assert [row["ms"] for row in ours] == [None]
    assert bench("skip")[0] == 1


def test_an_unwritten_output_gets_no_figure(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuattn, "prefill", lambda *_, out, **__: out)
    assert bench("prefill")[0] == 1
    assert "leaves parts of the output unwritten" in capsys.readouterr().out


def test_skip_lines_and_rows(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = bench("skip")
    assert status == 0
    rows = [row for row in results["rows"] if row["name"] == "w0_full"]
    assert [row["threshold"] for row in rows] == [None, 0, 1e-30, 1]
    assert [row["skip_rate"] for row in rows[:3]] == [0, 0, 0]
    assert 0.1 < rows[3]["skip_rate"] < 0.9
    assert rows[3]["dropped_mass"] > 0.01
    assert rows[3]["rel_error"] > 0.01
    text = capsys.readouterr().out
    assert "3.00x fmha_v2 of 3000 ms" in text
    assert "independent rows would skip" in text


def test_skip_notices_what_the_mass_does_not_explain(bench: Any, card: FakeGpu) -> None:
    card.broken = lambda skip: skip is not None and skip.threshold == 0.1
    status, results = bench("skip")
    rows = [row for row in results["rows"] if row["name"] == "w1_causal"]
    assert status == 1
    assert [row["ms"] is None for row in rows] == [False, False, True]


def test_skip_notices_when_tiny_is_not_dense(bench: Any, card: FakeGpu) -> None:
    card.broken = lambda skip: skip is not None and skip.threshold == 1e-30
    assert bench("skip")[0] == 1


def test_host_rows(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = bench("host")
    assert status == 0
    names = [row["name"] for row in results["rows"]]
    assert "cuattn: cupy, out=" in names
    assert "cuattn: decode, cupy, out=" in names
    assert "step: view of a cupy array" in names


def test_first_call_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"import cuattn": 0.01, "first": 1.0, "second": 1e-4}
    monkeypatch.setattr(first_call, "measure", lambda skip, cache: seconds)
    status, results = bench("first_call")
    assert status == 0
    found = {row["name"]: row["ms"] for row in results["rows"]}
    assert len(found) == 12
    assert found["first: dense, nothing cached"] == 1000.0


def test_parts_of_a_group_do_not_replace_the_last_full_run(bench: Any) -> None:
    for arguments in (["--quick"], ["--only", "tiny"], ["--no-peers"]):
        assert bench("prefill", *arguments) == (0, {})


def test_only_and_out(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.json"
    assert bench("skip", "--only", "w1", "--out", str(path))[0] == 0
    names = {row["name"] for row in json.loads(path.read_text("utf-8"))["rows"]}
    assert "w1_causal" in names
    assert "w0_full" not in names
    assert [file.name for file in path.parent.iterdir()] == ["mine.json"]


def test_out_is_for_one_group(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("all", "--out", "x.json")[0] == 2
    assert "--out names one file" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    report.write(path, {"gpu": "a"}, [])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.write(path, {"gpu": object()}, [])  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_benchmarks_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if missing_gpu() is None:
        pytest.skip("there is a GPU here")
    assert command.main(["prefill"]) == 2
    assert "wants an NVIDIA GPU" in capsys.readouterr().err


def test_named_shapes_have_one_name_each() -> None:
    names = [case.name for case in (*shapes.PREFILL, *shapes.SKIP)]
    assert len(set(names)) == len(names)
    assert set(shapes.QUICK_PREFILL) | set(shapes.QUICK_SKIP) <= set(names)
    for sweep in shapes.SKIP:
        assert len(sweep.others) in (0, len(sweep.thresholds))

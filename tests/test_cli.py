"""`python -m cuattn …`, on any machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cupy")

from cuattn import __main__ as cli
from cuattn import _cli_check, _cli_compile, _cli_info, _sources

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship one configuration and return an empty cache."""
    shipped = _cli_compile._shipped.configs("sm_90a")[:1]
    monkeypatch.setattr(_cli_compile._shipped, "configs", lambda arch: shipped)
    monkeypatch.setattr(_cli_compile._tool_params, "shipped_configs", list)
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_help_names_the_commands() -> None:
    text = subprocess.check_output([sys.executable, "-m", "cuattn", "--help"], text=True, cwd=ROOT)
    for command in ("info", "demo", "compile", "bench", "check"):
        assert command in text


def test_info_shows_versions_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--arch", "sm_90a"]) == 0
    shown = capsys.readouterr().out
    for word in ("cuattn", "CuPy", "NVRTC", "NumPy", "device", "cache", "kernels for sm_90a"):
        assert word in shown


@pytest.mark.parametrize("arch", _cli_compile.ARCHS)
def test_info_prints_the_plan_of_a_shape(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--plan", "2x4096x32x128", "--kv", "2x4096x8x128", "--causal", "--skip"]
    assert cli.main(["info", "--arch", arch, *shape]) == 0
    shown = capsys.readouterr().out
    for word in ("kernel", "block", "grid", "configuration", "reason", arch):
        assert word in shown


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        (["--plan", "2x4096x32"], "no shape"),
        (["--plan", "2x64x32x128", "--kv", "2x64x7x128"], "does not divide"),
        (["--plan", "2x64x8x128", "--dtype", "float64"], "float64"),
    ],
)
def test_info_refuses_what_a_call_would_refuse(
    shape: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["info", *shape])
    except SystemExit as stop:  # argparse's own way out
        status = int(str(stop.code))
    assert status == 2
    assert complaint in capsys.readouterr().err


def test_typical_devices_are_the_architectures_they_stand_for() -> None:
    capabilities = {arch: _cli_info.typical(arch).capability for arch in _cli_compile.ARCHS}
    assert capabilities["sm_80"] == (8, 0)
    assert capabilities["sm_90a"] == (9, 0)
    assert capabilities["sm_100"] == (10, 0)
    assert capabilities["sm_120"] == (12, 0)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_compile_fills_the_cache(
    jobs: str, one_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", "--arch", "sm_80", "--arch", "sm_90a", "--jobs", jobs]
    assert cli.main(command) == 0
    assert "2 configurations: 2 compiled, 0 cached, 0 failed" in capsys.readouterr().out
    assert len(list(one_configuration.glob("*.cubin"))) == 2
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "2 configurations: 0 compiled, 2 cached, 0 failed" in shown
    assert shown.count("registers") == 2


def test_compile_reports_a_failure(
    one_configuration: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = {name: text + "\n#error broken\n" for name, text in _sources.read().items()}
    monkeypatch.setattr(_sources, "read", lambda: broken)
    monkeypatch.setattr(_sources, "fingerprint", lambda: _sources.digest(broken))
    assert cli.main(["compile", "--arch", "sm_80", "--jobs", "1"]) == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "1 failed" in shown.out
    assert "broken" in shown.err


def test_compile_refuses_an_unwritable_cache(
    one_configuration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["compile", "--arch", "sm_80"]) == 1
    assert "CUATTN_CACHE_DIR" in capsys.readouterr().err


def test_progress_draws_a_bar_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        progress = _cli_compile.Progress(2)
        progress.step("first")
        progress.step("second")
        shown = capsys.readouterr().out
        assert ("█" in shown) == terminal
        assert "first\n" in shown
        assert shown.endswith("\n")


def test_check_without_a_gpu_says_so(
    one_configuration: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cli_info, "current_device", lambda: None)
    monkeypatch.setattr(_cli_compile.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(_cli_check.shutil, "which", lambda name: None)
    assert cli.main(["check"]) == 0
    shown = capsys.readouterr().out
    assert "no CUDA device" in shown
    assert "ok" in shown
    assert "nothing is run" in shown and "g++" in shown


@pytest.mark.emulator
def test_check_runs_in_the_emulator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cli_info, "current_device", lambda: None)
    monkeypatch.setattr(_cli_check, "compile_all", lambda: 0)
    assert cli.main(["check"]) == 0
    shown = capsys.readouterr().out
    assert "emulator" in shown
    assert shown.count("\nok") == len(_cli_check.cases())


def test_check_tells_right_from_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli_check.report("right", lambda: "")
    assert not _cli_check.report("wrong", lambda: "out[0] is off by 3")
    assert not _cli_check.report("broken", lambda: str(1 // 0))
    right, wrong, broken = capsys.readouterr().out.splitlines()
    assert right.startswith("ok")
    assert wrong.startswith("fail") and "off by 3" in wrong
    assert broken.startswith("fail") and "ZeroDivisionError" in broken


@pytest.mark.parametrize("case", _cli_check.cases(), ids=lambda case: case.name)
def test_check_cases_have_an_answer(case: _cli_check.Case) -> None:
    exact, plain = _cli_check.expected(case)
    assert np.isfinite(exact.out).all()
    assert 0 < np.abs(plain.out.astype(np.float64) - exact.out).max() < 0.1
    if "skip_softmax" in case.options:
        assert exact.skipped.sum() > 0.5 * exact.visited.sum()
        assert exact.margin > 1e-3  # no vote is so close that rounding could turn it


@pytest.mark.gpu
def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out.count("\nok") == len(_cli_check.cases())


def test_bench_outside_a_checkout_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_sources, "kernel_root", lambda: tmp_path / "kernels")
    assert cli.main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err

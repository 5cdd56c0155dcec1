"""The public functions on CPU arrays: the opt-in, what is taken and given, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import RAGGED, USUAL, Case, batched, paged, ragged
from compare import assert_close

import cuattn
from cuattn import _host, emulator
from cuattn.emulator import _build, _settings

pytestmark = pytest.mark.emulator

X = np.zeros((1, 4, 2, 16), np.float16)


@pytest.mark.parametrize("build", (batched, ragged, paged), ids=lambda f: f.__name__)
def test_numpy_in_numpy_out(build: Any) -> None:
    call = build(USUAL)
    with emulator.enabled(race=True) as launches:
        out, lse = getattr(cuattn, call.function)(*call.arrays, **call.options, return_lse=True)
    expected, plain = call.reference(), call.plain()
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    assert_close(out, expected.out, plain.out, call.case, "out")
    assert_close(lse, expected.lse, plain.lse, call.case, "lse")
    assert len(launches) == 1 and launches[0].switches > 1000


def test_given_outputs_are_written_where_requests_are() -> None:
    call = ragged(Case(lengths=RAGGED))
    out = np.full((*call.arrays[0].shape[:2], 64), 7, ml_dtypes.bfloat16)
    lse = np.full(out.shape[:2], 7, np.float32)
    with emulator.enabled():
        returned = cuattn.prefill_ragged(*call.arrays, **call.options, out=out, lse=lse)
    assert returned is out
    tokens = sum(q_len for q_len, _ in RAGGED)
    assert (out[tokens:] == 7).all() and (lse[tokens:] == 7).all()
    np.testing.assert_allclose(lse[:tokens], call.reference().lse[:tokens], rtol=1e-4)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_frameworks_on_the_cpu(name: str) -> None:
    framework = pytest.importorskip(name)
    x = np.random.default_rng(0).standard_normal((1, 40, 2, 32)).astype(np.float32)
    if name == "torch":
        y = framework.from_numpy(x).to(framework.bfloat16)
    else:
        y = framework.numpy.asarray(x, "bfloat16", device=framework.devices("cpu")[0])
    z = x.astype(ml_dtypes.bfloat16)
    with emulator.enabled():
        given, wanted = cuattn.prefill(y, y, y), cuattn.prefill(z, z, z)
        assert isinstance(given, np.ndarray)
        np.testing.assert_array_equal(given.view("u2"), wanted.view("u2"))
        if name == "torch":
            out = framework.empty_like(y)
            assert cuattn.prefill(y, y, y, out=out) is out
            np.testing.assert_array_equal(out.view(framework.int16).numpy(), wanted.view("i2"))
        else:
            with pytest.raises(TypeError, match="out is read-only"):
                cuattn.prefill(y, y, y, out=y)
    with pytest.raises(TypeError, match=r"cuattn\.emulator\.enabled"):
        cuattn.prefill(y, y, y)


def test_counters_add_up_and_reset() -> None:
    call = batched(Case(lengths=((150, 400),), data="structured", scale=0.25))
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats)
    with emulator.enabled():
        cuattn.prefill(*call.arrays, **call.options, skip_softmax=skip)
        once = stats.per_head()
        cuattn.prefill(*call.arrays, **call.options, skip_softmax=skip)
    assert stats.visited > stats.skipped > 0 and once["visited"].shape == (1, 4)
    np.testing.assert_array_equal(stats.per_head()["visited"], 2 * once["visited"])
    stats.reset()
    assert stats.visited == 0


class TestOptIn:
    """Without it a CPU array is refused, and the error says how to get it."""

    @pytest.fixture(autouse=True)
    def nothing_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUATTN_EMULATOR", raising=False)

    def test_an_array_on_the_cpu_is_refused(self) -> None:
        for value in (X, X.astype(ml_dtypes.bfloat16)):
            with pytest.raises(TypeError, match=r"q is on the CPU \(a numpy ndarray\)") as caught:
                cuattn.prefill(value, value, value)
            for word in ("CUDA device", "CUATTN_EMULATOR=1", "cuattn.emulator.enabled()"):
                assert word in str(caught.value)

    def test_by_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUATTN_EMULATOR", "0")
        with pytest.raises(TypeError, match="on the CPU"):
            cuattn.prefill(X, X, X)
        monkeypatch.setenv("CUATTN_EMULATOR", "1")
        assert cuattn.prefill(X, X, X).shape == X.shape

    def test_it_ends_with_the_block_whatever_happens(self) -> None:
        with pytest.raises(ZeroDivisionError), emulator.enabled():
            raise ZeroDivisionError
        assert not _host.emulated()

    def test_blocks_nest(self) -> None:
        with emulator.enabled(race=True), emulator.enabled(schedule="reverse"):
            assert _settings.current().schedule == "reverse"
        with emulator.enabled(race=True):
            with emulator.enabled():
                pass
            assert _settings.current().race


def test_errors_are_those_of_the_library() -> None:
    x = np.zeros((1, 4, 2, 12), np.float16)
    with emulator.enabled():
        with pytest.raises(ValueError, match="multiple of"):
            cuattn.prefill(x, x, x)
        with pytest.raises(ValueError, match="out shares memory with q"):
            cuattn.prefill(X, X, X, out=X)
        frozen = np.zeros_like(X)
        frozen.flags.writeable = False
        with pytest.raises(TypeError, match="out is read-only"):
            cuattn.prefill(X, X, X, out=frozen)
        assert cuattn.prefill(frozen, frozen, frozen).shape == X.shape


def test_it_says_once_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_settings, "_said", False)
    with emulator.enabled(), pytest.warns(UserWarning, match="emulator") as seen:
        cuattn.prefill(X, X, X)
        cuattn.prefill(X, X, X)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_no_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"g\+\+ was not found"):
        _build.compiler()


def test_importing_it_builds_and_loads_nothing() -> None:
    code = (
        "import sys, cuattn; assert 'cuattn.emulator' not in sys.modules; cuattn.emulator.enabled; "
        "from cuattn.emulator import _build; assert not _build.core.cache_info().currsize; "
        "print({'cupy', 'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    for age, name in enumerate(("newest.so", "newer.so", "older.so", "oldest.so")):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (0, time.time() - 3600 * (age + 1)))
    (tmp_path / "sources-1").mkdir()
    (tmp_path / "sources-1" / "fmha.cu").write_bytes(bytes(500))
    _build.prune(tmp_path, 2600)
    assert {path.name for path in tmp_path.iterdir()} == {"newest.so", "newer.so", "sources-1"}
    os.utime(tmp_path / "newer.so")
    _build.prune(tmp_path, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"newer.so", "sources-1"}, "in use"

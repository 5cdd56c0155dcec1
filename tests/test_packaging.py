"""The kernels travel: in the wheel, in the sdist, and in a bare checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cuattn import _cli_compile

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path.relative_to(ROOT / "kernels").as_posix()
    for path in (ROOT / "kernels").rglob("*.cu*")
    if path.suffix in (".cu", ".cuh")
)

EMULATOR = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "cuattn" / "emulator").rglob("*")
    if path.suffix in (".cpp", ".h", ".cuh")
)

# Prints where the package and its kernels are; then compiles one shipped configuration.
PROBE = """
import sys
import cuattn
from cuattn import _compile, _sources
print(cuattn.__file__)
print(_sources.kernel_root())
if sys.argv[1:]:
    print(_compile.cubin_path(*sys.argv[1:]).read_bytes()[:4])
"""


def build(target: str, folder: Path, source: Path = ROOT) -> Path:
    """Make the wheel or sdist of a source folder."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made


def probe(path: Path, *job: str) -> list[str]:
    """Run PROBE in a new process that finds the package in `path` before any other."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *job],
        cwd=path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def kernels_in(names: list[str], folder: str) -> list[str]:
    return sorted(
        name.removeprefix(folder)
        for name in names
        if name.startswith(folder) and name.endswith((".cu", ".cuh"))
    )


def test_wheel_holds_the_kernels_once(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build("wheel", tmp_path)).namelist()
    assert kernels_in(names, "cuattn/kernels/") == SOURCES
    emulator = [name for name in names if name.startswith("cuattn/emulator/")]
    assert sorted(name for name in emulator if not name.endswith((".py", ".md"))) == EMULATOR
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cuattn"}
    assert "cuattn/kernels/__init__.py" not in names
    assert {"__init__.py", "decode.py", "README.md"} <= {
        name.removeprefix("cuattn/interop/flashinfer/") for name in names
    }
    assert any(name.endswith("LICENSE") for name in names)


def test_sdist_is_a_checkout_and_makes_the_same_wheel(tmp_path: Path) -> None:
    made = build("sdist", tmp_path / "sdist")
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path)  # our own: no filter needed, and Python 3.11.2 has none
    (unpacked,) = tmp_path.glob("cuattn-*")
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")]
    assert kernels_in(names, "kernels/") == SOURCES
    assert {"Makefile", "LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= set(
        names
    )
    first = zipfile.ZipFile(build("wheel", tmp_path / "first"))
    second = zipfile.ZipFile(build("wheel", tmp_path / "second", unpacked))
    assert sorted(first.namelist()) == sorted(second.namelist())


def test_installed_wheel_compiles_from_its_own_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    wheel = build("wheel", tmp_path / "wheel")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--quiet", "--target", site, wheel], check=True)
    job = _cli_compile.shipped(["sm_90a"])[0]
    package, kernels, start = probe(site, job.kernel, job.config, job.arch)
    assert Path(package).parent == site / "cuattn"
    assert Path(kernels) == site / "cuattn" / "kernels"
    assert start == repr(b"\x7fELF")
    if shutil.which("g++"):  # the emulator's C++ travels, too
        code = (
            "import numpy as np, cuattn\nx = np.ones((1, 4, 1, 8), np.float16)\n"
            "print(cuattn.prefill(x, x, x).sum())"
        )
        environment = {**os.environ, "PYTHONPATH": str(site), "CUATTN_EMULATOR": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=site,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.stdout == "32.0\n", done.stderr


def test_bare_checkout_finds_its_kernels(tmp_path: Path) -> None:
    for folder in ("cuattn", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    package, kernels = probe(tmp_path)
    assert Path(package).parent == tmp_path / "cuattn"
    assert Path(kernels) == tmp_path / "kernels"

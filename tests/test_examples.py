"""The examples run as a reader would run them, or say that they want a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import missing_gpu

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FRAMEWORKS = {
    "from_cupy": "cupy",
    "from_torch": "torch",
    "from_jax": "jax",
    "mla_decode": "cupy",
    "paged_decode": "cupy",
    "context_parallel": "torch",
}
WITHOUT_A_GPU = [  # they run in the emulator
    "context_parallel"
]


def run(example: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, on this checkout."""
    framework = FRAMEWORKS[example.stem]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def test_every_example_is_tested() -> None:
    assert [example.stem for example in EXAMPLES] == sorted(FRAMEWORKS)


@pytest.mark.gpu
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs_on_a_gpu(example: Path) -> None:
    check_output(example)


@pytest.mark.emulator
@pytest.mark.parametrize("name", WITHOUT_A_GPU)
def test_runs_without_a_gpu(name: str) -> None:
    if missing_gpu() is None:
        pytest.skip("there is a GPU here")
    check_output(ROOT / "examples" / f"{name}.py")


def check_output(example: Path) -> None:
    """Demand a line about dense attention and one about skipping; times may follow."""
    done = run(example)
    assert done.returncode == 0, done.stderr
    said = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert [word for word in said if word != "time"][:2] == ["dense", "skip"]


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if example.stem not in WITHOUT_A_GPU],
    ids=lambda path: path.stem,
)
def test_says_that_it_wants_a_gpu(example: Path) -> None:
    if missing_gpu() is None:
        pytest.skip("there is a GPU here")
    done = run(example)
    assert done.returncode == 1
    assert "wants an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(example: Path) -> None:
    assert 20 <= len(example.read_text(encoding="utf-8").splitlines()) <= 90

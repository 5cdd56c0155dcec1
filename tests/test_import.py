"""`import cuattn` is light: no CuPy, no framework, and hardly any time."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cuattn

HEAVY = (
    "cupy",
    "cupyx",
    "cuda",
    "torch",
    "transformers",
    "jax",
    "jaxlib",
    "matplotlib",
    "scipy",
    "hypothesis",
)
SECONDS = 0.15


def fresh(code: str) -> str:
    """Output of a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["cuattn", "cuattn.reference", "cuattn.__main__", "cuattn.interop.distributed"],
)
def test_imports_neither_cupy_nor_a_framework(module: str) -> None:
    loaded = fresh(
        f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    assert not set(loaded.split()) & set(HEAVY)


def test_modules_for_frameworks_are_imported_when_asked_for() -> None:
    assert fresh("import sys, cuattn; print(*[x for x in sys.modules if 'interop' in x])") == ""


def test_costs_little_beyond_numpy() -> None:
    code = (
        "import time, numpy; start = time.process_time(); import cuattn; "
        "print(time.process_time() - start)"  # of this process alone: other tests run beside it
    )
    seconds = min(float(fresh(code)) for _ in range(5))
    assert seconds <= SECONDS, f"import cuattn took {seconds:.3f} s beyond numpy's"


def test_public_names_exist() -> None:
    assert cuattn.__version__
    for name in cuattn.__all__:
        assert hasattr(cuattn, name), f"cuattn.__all__ names {name}, which is not there"

"""What pytest makes of the tests on a GPU: a mistake there costs all tests of a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ON_HOPPER = """
import sys, pytest

class Hopper:
    def pytest_configure(self) -> None:
        sys.modules["conftest"].missing_gpu = lambda: None
        sys.modules["conftest"].has_hopper = lambda: True

sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]], plugins=[Hopper()]))
"""


def test_on_hopper_the_tables_of_prefill_are_for_both_kernels() -> None:
    command = [sys.executable, "-c", ON_HOPPER]
    command += ["tests/test_prefill.py", "tests/test_emulator_prefill_hopper.py"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout
    tests = [line.split("::", 1) for line in done.stdout.splitlines() if "::" in line]
    names = [name for file, name in tests if file.endswith("test_prefill.py")]
    portable, hopper = ([n for n in names if kernel in n] for kernel in ("portable", "hopper"))
    assert len(portable) == len(hopper) > 100
    assert len(tests) > len(names)  # the emulator's own table is there, too

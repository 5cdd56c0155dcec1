"""`make coverage`: which lines of the kernels the emulator's race cases execute.

Lines are counted by gcov over all configurations together; a line counts as executed if any of them
executed it. `--run` is the child process, whose end writes the counts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED = 1.0  # share of the lines


def compile_for_gcov(folder: Path) -> None:
    """Let kernels be compiled with counters, in a folder of their own, and without optimisation."""
    from cuattn.emulator import _build

    made = _build._compiled

    def compiled(path: Path, sources: list[str], options: Sequence[str], *link: str) -> Path:
        if path.name.startswith("core-"):
            return made(path, sources, options, *link)
        own = folder / path.stem
        library = own / path.name
        if not library.exists():
            own.mkdir()
            compiler, (source,) = _build.compiler(), sources
            more = ["-O0", "--coverage", "-fprofile-abs-path"]
            _build._call(path.stem, [compiler, *options, *more, "-c", source, "-o", f"{own}/0.o"])
            command = [compiler, "-shared", "--coverage", "-o", str(library), f"{own}/0.o", *link]
            _build._call(path.stem, command)
        return library

    _build._compiled = compiled


def run_cases(folder: Path) -> None:
    """Run the race cases, which between them reach every branch."""
    import test_append_kv
    import test_emulator_decode
    import test_emulator_mla
    import test_emulator_prefill as tests
    import test_emulator_prefill_hopper
    import test_merge_states
    import test_mla_portable
    import test_validate

    import cuattn
    from cuattn import emulator

    compile_for_gcov(folder)
    calls = [(call, None) for call in tests.RACES.values()]
    for call, fields in tests.SKIPS.values():
        calls.append((call, cuattn.SkipSoftmax(**fields, stats=cuattn.SkipStats())))
    for call, skip in calls:
        with emulator.enabled():
            function = getattr(cuattn, call.function)
            function(*call.arrays, **call.options, skip_softmax=skip, return_lse=True)
    modules = (
        test_emulator_decode,
        test_emulator_mla,
        test_emulator_prefill_hopper,
        test_mla_portable,
    )
    for module in (*modules, test_append_kv, test_merge_states, test_validate):
        module.run_races()


def executed(folder: Path) -> dict[str, dict[int, int]]:
    """Counts by file of `kernels/` and line."""
    from cuattn import _sources

    root = _sources.kernel_root()
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(folder.glob("*/*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        text = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        for file in json.loads(text.stdout)["files"]:
            path = Path(file["file"])
            if path.is_relative_to(root):
                for line in file["lines"]:
                    name = path.relative_to(root).as_posix()
                    counts[name][line["line_number"]] += line["count"]
    return counts


def report(counts: dict[str, dict[int, int]]) -> float:
    """Print a line for each file and return the share of lines that were executed."""
    total = missed = 0
    for name, lines in sorted(counts.items()):
        gone = [number for number, count in sorted(lines.items()) if count == 0]
        total, missed = total + len(lines), missed + len(gone)
        where = f"  not executed: {', '.join(map(str, gone))}" if gone else ""
        print(f"{name:<32}{len(lines) - len(gone):>5} of {len(lines):<5}{where}")
    share = 1 - missed / total if total else 0.0
    print(f"{total - missed} of {total} lines of the kernels run in the emulator: {share:.1%}")
    return share


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        sys.path.insert(0, str(ROOT / "tests"))
        run_cases(Path(arguments[1]))
        return 0
    if shutil.which("g++") is None:
        print("g++ was not found; the emulator wants version 12 or later of it")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.coverage", "--run", folder]
        subprocess.run(command, cwd=ROOT, check=True)
        share = report(executed(Path(folder)))
    if share < WANTED:
        print(f"wanted {WANTED:.0%}")
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

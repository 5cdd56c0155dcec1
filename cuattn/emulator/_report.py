"""From a code address in a message of the core to the kernel's lines."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

from ._build import INCLUDE

_TOKEN = re.compile(r"\[\[(.+?)\+(0x[0-9a-f]+)\]\]")


class EmulatorError(RuntimeError):
    """A kernel broke a rule: out of bounds, a race, a deadlock, lanes that went apart."""


def explain(message: str) -> str:
    """Put lines of the kernel, innermost first, in the place of code addresses."""
    tokens = _TOKEN.findall(message)
    by_library = defaultdict(set)
    for library, offset in tokens:
        by_library[library].add(offset)
    for library, offsets in by_library.items():
        _look_up(library, tuple(sorted(offsets)))
    return _TOKEN.sub(lambda match: _lines[match.group(1), match.group(2)], message)


def differing(suspicions: str) -> str | None:
    """Return the first suspicion whose two places are different lines of the kernel."""
    for record in filter(None, suspicions.split("\x1e")):
        one, other, text = record.split("\t", 2)
        one, other = explain(one), explain(other)
        if one != other:
            return f"{text.splitlines()[0]}\n  at {one}\n  and at {other}" + "".join(
                f"\n{line}" for line in text.splitlines()[1:]
            )
    return None


_lines: dict[tuple[str, str], str] = {}


def _look_up(library: str, offsets: tuple[str, ...]) -> None:
    missing = [offset for offset in offsets if (library, offset) not in _lines]
    tool = _tool()
    if not missing:
        return
    if tool is None:
        for offset in missing:
            _lines[library, offset] = f"{Path(library).name}+{offset}"
        return
    # -a prints each address first, then the chain of inlined calls, innermost first.
    output = subprocess.run(
        [tool, "-a", "-i", "-e", library, *missing], capture_output=True, text=True
    ).stdout
    for part in re.split(r"^0x0*", output, flags=re.MULTILINE)[1:]:
        address, *places = part.splitlines()
        kernel = [place for place in places if not place.startswith(str(INCLUDE))]
        _lines[library, f"0x{address}"] = " < ".join(map(_short, kernel or places))
    for offset in missing:
        _lines.setdefault((library, offset), f"{Path(library).name}+{offset}")


def _short(place: str) -> str:
    """Cut `…/kernels/tile/copy.cuh:51 (discriminator 2)` to `tile/copy.cuh:51`."""
    path, _, line = place.partition(" ")[0].rpartition(":")
    parts = Path(path).parts
    names = ("core", "ptx", "tile", "attention")
    start = -2 if len(parts) > 1 and parts[-2] in names else -1
    return f"{'/'.join(parts[start:])}:{line}"


@cache
def _tool() -> str | None:
    return shutil.which("addr2line")

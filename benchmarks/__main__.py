"""Command line: `python -m benchmarks GROUP`, or `all`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from cuattn import _device

from . import decode, decode_skip, first_call, forms, host, mla, prefill, report, skip, tools
from .report import Options, Row

GROUPS: dict[str, Callable[[Options], list[Row]]] = {
    "prefill": prefill.run,
    "forms": forms.run,
    "skip": skip.run,
    "decode": decode.run,
    "decode_skip": decode_skip.run,
    "mla": mla.run,
    "tools": tools.run,
    "host": host.run,
    "first_call": first_call.run,
}


def main(arguments: Sequence[str]) -> int:
    """Measure; 1 if a result of ours was wrong."""
    given = parser().parse_args(arguments)
    groups = list(GROUPS) if given.group == "all" else [given.group]
    if given.out and len(groups) > 1:
        print("--out names one file, but `all` writes one per group", file=sys.stderr)
        return 2
    try:
        _device.count()
    except RuntimeError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    options = Options(
        quick=given.quick,
        only=tuple(given.only or ()),
        peers=not given.no_peers,
        flashinfer=given.flashinfer,
    )
    meta = report.environment(given.commit)
    report.say("  ".join(f"{name} {value}" for name, value in meta.items() if name != "command"))
    failed = False
    for group in groups:
        report.say(f"\n{group}")
        start = perf_counter()
        rows = GROUPS[group](options)
        report.say(f"{group}: {perf_counter() - start:.0f} s")
        failed |= any(row.impl == "cuattn" and row.ms is None for row in rows)
        path = given.out or (report.RESULTS / f"{group}.json" if options.complete else None)
        if path:
            report.write(path, meta, rows)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure on the GPU, one line a case. A complete run of a group replaces "
        "benchmarks/results/GROUP.json.",
    )
    top.add_argument("group", choices=[*GROUPS, "all"])
    top.add_argument("--quick", action="store_true", help="a few cases only")
    top.add_argument(
        "--only", action="append", metavar="NAME", help="cases whose name holds this; repeatable"
    )
    top.add_argument("--out", type=Path, metavar="FILE", help="write the rows here")
    top.add_argument("--no-peers", action="store_true", help="measure cuattn alone")
    top.add_argument(
        "--flashinfer", action="store_true", help="with FlashInfer; compiles for minutes at first"
    )
    top.add_argument("--commit", help="for the results file, where git cannot be asked")
    return top


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

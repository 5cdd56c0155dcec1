"""`python -m cuattn compile`: every shipped configuration of an architecture into the cache."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from . import _compile, _device, _shipped, _tool_params

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
DEFAULT_ARCH = "sm_90a"  # where no GPU says otherwise


@dataclass(frozen=True, slots=True)
class Job:
    """One configuration for one architecture."""

    kernel: str
    config: str
    arch: str

    @property
    def label(self) -> str:
        """The configuration in few words: true flags by name, other values with theirs."""
        fields = re.findall(r"\.(\w+)\s*=\s*(?:\w+::)?(\w+)", self.config)
        words = (
            name if value == "true" else f"{name}={value}" if value.isdigit() else value
            for name, value in fields
            if value != "false"
        )
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: figures, or an error."""

    job: Job
    registers: int = 0
    spills: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    fresh: bool = False
    error: str = ""

    @property
    def line(self) -> str:
        """The outcome in one line, the configuration last because it is the longest."""
        job = self.job
        if self.error:
            return f"{job.arch:<7} {job.kernel:<15} FAILED  {job.label}"
        when = f"{self.seconds:5.2f} s" if self.fresh else " cached"
        return (
            f"{job.arch:<7} {job.kernel:<15} {self.registers:4} registers "
            f"{self.spills:5} B spilled {when}  {job.label}"
        )


def default_arch() -> str:
    """Return this machine's architecture, or the one to assume without a GPU."""
    try:
        return _device.describe(_device.current()).arch
    except RuntimeError:
        return DEFAULT_ARCH


def shipped(archs: Sequence[str]) -> list[Job]:
    """Every configuration that a plan can name on these architectures, each once."""
    jobs = (
        Job(kernel, config.define(), arch)
        for arch in archs
        for kernel, config in (
            *_shipped.configs(arch),
            *_tool_params.shipped_configs(),
        )
    )
    return list(dict.fromkeys(jobs))


def build(job: Job) -> Outcome:
    """Compile one job into the cache, or find it there."""
    try:
        entry = _compile.load(job.kernel, job.config, job.arch)
    except RuntimeError as error:
        return Outcome(job, error=str(error))
    done = entry.compiled
    return Outcome(job, done.registers, done.spills, done.notes, done.seconds, entry.fresh)


def build_all(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """Yield outcomes as they come, from this process or from several."""
    if processes == 1:
        yield from map(build, jobs)
        return
    # Spawned, not forked: a fork would copy whatever threads and contexts the caller has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        futures: list[Future[Outcome]] = [pool.submit(build, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Progress:
    """Lines above a bar on a terminal; plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.bar = sys.stdout.isatty()

    def step(self, line: str) -> None:
        """Print what was finished and move the bar."""
        self.done += 1
        if not self.bar:
            print(line, flush=True)
            return
        columns = shutil.get_terminal_size().columns
        width = max(10, min(40, columns - 20))
        filled = width * self.done // self.total
        bar = "█" * filled + "░" * (width - filled)
        end = "\n" if self.done == self.total else ""
        print(f"\r\x1b[K{line}\n{bar} {self.done}/{self.total}", end=end, flush=True)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of `compile`."""
    command.add_argument(
        "--arch",
        action="append",
        choices=(*ARCHS, "all"),
        help=f"target, may be repeated; default: this machine's GPU, else {DEFAULT_ARCH}",
    )
    command.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one per core)",
    )


def run(options: argparse.Namespace) -> int:
    """Compile; 0 if everything did."""
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}, wanted 1 or more")
    archs = options.arch or [default_arch()]
    jobs = shipped(ARCHS if "all" in archs else archs)
    folder = _compile.cache_dir()
    if problem := unwritable():
        print(f"the cache cannot be filled: {problem}; set CUATTN_CACHE_DIR", file=sys.stderr)
        return 1
    start = time.perf_counter()
    progress = Progress(len(jobs))
    outcomes = []
    for outcome in build_all(jobs, options.jobs):
        progress.step(outcome.line)
        outcomes.append(outcome)
    return report(outcomes, f"{time.perf_counter() - start:.1f} s, in {folder}")


def report(outcomes: Sequence[Outcome], where: str) -> int:
    """Print the total and every failure; 0 if there is none."""
    failed = [outcome for outcome in outcomes if outcome.error]
    fresh = sum(outcome.fresh for outcome in outcomes)
    spilled = sum(outcome.spills > 0 for outcome in outcomes)
    print(
        f"{len(outcomes)} configurations: {fresh} compiled, "
        f"{len(outcomes) - fresh - len(failed)} cached, {len(failed)} failed, "
        f"{spilled} with spills; {where}"
    )
    for outcome in outcomes:
        for note in outcome.notes:
            print(f"{outcome.job.arch} {outcome.job.kernel} {outcome.job.label}: {note}")
    for outcome in failed:
        print(textwrap.indent(outcome.error.rstrip(), "  "), file=sys.stderr)
    return 1 if failed else 0


def unwritable() -> str:
    """Why the cache folder cannot be written, or an empty string."""
    folder = _compile.cache_dir()
    if folder is None:
        return "there is no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error)

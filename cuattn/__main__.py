"""Command line: `python -m cuattn info | demo | compile | bench | check`."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence

from . import _cli_check, _cli_compile, _cli_info, _sources


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("demo", "bench"):  # both have a parser of their own
        return {"demo": demo, "bench": bench}[arguments[0]](arguments[1:])
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        print(f"python -m cuattn {options.command}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    top = argparse.ArgumentParser(prog="python -m cuattn", description="Attention kernels.")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, module, text in (
        ("info", _cli_info, "the device, versions, the cache, and which kernels would run and why"),
        ("compile", _cli_compile, "fill the kernel cache for an architecture; needs no GPU"),
        ("check", _cli_check, "self-test: small cases on the GPU against the NumPy reference"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("demo", help="the operations on real data, on the GPU")
    commands.add_parser("bench", help="measure, one line a case; from a checkout only")
    return top


def demo(arguments: list[str]) -> int:
    """Hand over to the demonstration."""
    from . import _demo

    return _demo.main(arguments)


def bench(arguments: list[str]) -> int:
    """Hand over to the benchmarks, which are part of a checkout and not of the package."""
    checkout = _sources.kernel_root().parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        print(
            "python -m cuattn bench: the benchmarks are part of a checkout, not of the installed "
            "package; run this from the project's folder",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(checkout))
    sys.argv = ["python -m cuattn bench", *arguments]
    runpy.run_module("benchmarks", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m cuattn info`: the machine, the cache, and which kernels would run and why."""

from __future__ import annotations

import argparse
import math
import platform
from importlib import metadata

from . import __version__, _check, _cli_compile, _compile, _device, _heuristics
from ._records import Device, Plan, Problem, SkipMode, View

# A plan for a machine that is not here is made for a typical card of its architecture:
# name, multiprocessors, bytes of shared memory that one block may have.
TYPICAL = {
    "sm_80": ("A100", 108, 166912),
    "sm_86": ("A10", 72, 101376),
    "sm_89": ("L40S", 142, 101376),
    "sm_90a": ("H200", 132, 232448),
    "sm_100": ("B200", 148, 232448),
    "sm_120": ("RTX 5090", 170, 101376),
}
EXAMPLES = (
    "1x16384x16x128 --causal",
    "4x4096x32x128 --kv 4x4096x8x128 --causal",
    "16x1024x16x64",
    "1x4096x128x192 --kv 1x4096x128x192 --v-dim 128 --causal",
    "1x65536x64x128 --kv 1x65536x4x128 --skip",
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of `info`."""
    command.add_argument(
        "--arch",
        choices=_cli_compile.ARCHS,
        help=f"plan for it; default: this machine's, else {_cli_compile.DEFAULT_ARCH}",
    )
    plan = command.add_argument_group("the plan for one call of cuattn.prefill")
    plan.add_argument("--plan", metavar="SHAPE", type=shape, help="q's: batch x seq x heads x dim")
    plan.add_argument("--kv", metavar="SHAPE", type=shape, help="k's and v's, default: q's")
    plan.add_argument("--v-dim", type=int, help="head dimension of v, default: k's")
    plan.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    plan.add_argument("--out-dtype", help="default: the same")
    plan.add_argument("--causal", action="store_true")
    plan.add_argument("--window-left", type=int, default=-1)
    plan.add_argument("--soft-cap", type=float, default=0.0)
    plan.add_argument("--skip", action="store_true", help="with skip-softmax")


def shape(text: str) -> tuple[int, ...]:
    """Parse "2x4096x32x128"."""
    try:
        sizes = tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; wanted four sizes: 2x4096x32x128")
    return sizes


def run(options: argparse.Namespace) -> int:
    """Print one plan if a shape is given, everything otherwise."""
    here = current_device()
    device = here if here is not None and options.arch in (None, here.arch) else None
    if device is None:
        device = typical(options.arch or _cli_compile.DEFAULT_ARCH)
    if options.plan:
        print("\n".join(describe(_heuristics.prefill(problem(options), device), device)))
        return 0
    for title, text in (*versions(), ("device", here_text(here)), ("cache", cache_text())):
        print(f"{title:<10} {text}")
    print(f"\nkernels for {device.arch}, on {device.name}:")
    for kernel, count in shipped_counts(device.arch).items():
        print(f"  {kernel}, {count} configurations")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for example in EXAMPLES:
        asked = parser.parse_args(["--plan", *example.split()])
        plan = _heuristics.prefill(problem(asked), device)
        print(f"\n{example}\n  {plan.kernel}, {block(plan)}\n  {plan.reason}")
    print("\nfor another shape: python -m cuattn info --plan BATCHxSEQxHEADSxDIM …")
    return 0


def current_device() -> Device | None:
    """Return the current CUDA device, or None where there is none or no CuPy."""
    try:
        ordinal = _device.current()
    except RuntimeError:
        return None
    return _device.describe(ordinal)


def typical(arch: str) -> Device:
    """A card to plan for that is not in this machine."""
    name, multiprocessors, shared_memory = TYPICAL[arch]
    number = int(arch.removeprefix("sm_").rstrip("a"))
    return Device(0, name, divmod(number, 10), arch, multiprocessors, shared_memory)


def versions() -> list[tuple[str, str]]:
    """Versions of what takes part, each with a title."""
    python = f"{platform.python_version()} on {platform.platform(terse=True)}"
    numpy = f"NumPy {metadata.version('numpy')}, ml_dtypes {metadata.version('ml_dtypes')}"
    found = [("cuattn", __version__), ("Python", f"{python}, {numpy}"), ("CuPy", cupy_text())]
    for title, package in (("PyTorch", "torch"), ("JAX", "jax")):
        try:
            found.append((title, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((title, "not installed (not needed)"))
    return found


def cupy_text() -> str:
    """Versions of CuPy, of its compiler and of the driver."""
    try:
        import cupy
    except ImportError:
        return "not installed: pip install 'cuattn[cuda13]'"
    nvrtc = ".".join(map(str, _compile.nvrtc_version()))
    driver = cupy.cuda.runtime.driverGetVersion()
    driver_text = f"{driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    return f"{cupy.__version__}, NVRTC {nvrtc}, driver for CUDA {driver_text}"


def here_text(device: Device | None) -> str:
    """One line on this machine's GPU."""
    if device is None:
        return "none: kernels can be compiled here, not run"
    return (
        f"{device.name}, compute capability {device.capability[0]}.{device.capability[1]} → "
        f"{device.arch}, {device.multiprocessors} multiprocessors, "
        f"{device.shared_memory // 1024} KiB of shared memory a block"
    )


def cache_text() -> str:
    """One line on the kernel cache: folder, number of files, size."""
    folder = _compile.cache_dir()
    if folder is None:
        return "in a private folder of each process, as there is no home folder"
    if not folder.is_dir():
        return f"{folder}, not made yet"
    sizes = {path: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    cubins = sum(path.suffix == ".cubin" for path in sizes)
    return f"{folder}, {cubins} cubins, {sum(sizes.values()) / 2**20:.1f} MiB"


def shipped_counts(arch: str) -> dict[str, int]:
    """Kernel → number of configurations shipped for an architecture."""
    kernels = [job.kernel for job in _cli_compile.shipped([arch])]
    return {kernel: kernels.count(kernel) for kernel in dict.fromkeys(kernels)}


def problem(options: argparse.Namespace) -> Problem:
    """The call that `--plan` describes, checked as a real one would be."""
    kv = options.kv or options.plan
    q = packed(options.plan, options.dtype)
    k = packed(kv, options.dtype)
    v = packed((*kv[:3], options.v_dim or kv[3]), options.dtype)
    skip = SkipMode(source="threshold", unsafe=False) if options.skip else None
    return _check.batched(
        q,
        k,
        v,
        _check.Options(
            causal=options.causal,
            window_left=options.window_left,
            soft_cap=options.soft_cap,
            skip=skip,
            out_dtype=options.out_dtype,
        ),
    )


def packed(sizes: tuple[int, ...], dtype: str) -> View:
    """A contiguous view of no memory in particular."""
    strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    return View(0, sizes, strides, dtype, 0, None, False, None, 0)


def describe(plan: Plan, device: Device) -> list[str]:
    """Lines about one plan."""
    return [
        f"device         {device.name} ({device.arch}, {device.multiprocessors} multiprocessors)",
        f"kernel         {plan.kernel}",
        f"block          {block(plan)}",
        f"grid           {plan.grid[0]} × {plan.grid[1]} × {plan.grid[2]} blocks",
        f"configuration  {plan.config.define()}",
        f"reason         {plan.reason}",
    ]


def block(plan: Plan) -> str:
    """What one block is."""
    geometry = plan.geometry
    return (
        f"{geometry.block_q} queries against {geometry.block_kv} keys at a time, "
        f"{plan.threads} threads, {plan.shared_memory / 1024:.0f} KiB of shared memory"
    )

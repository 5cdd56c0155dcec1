"""g++: the emulator's core once, and each kernel and configuration, behind a cache on disk."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .. import _compile, _sources

FOLDER = Path(__file__).resolve().parent
INCLUDE = FOLDER / "include"

# -march=native: the core is used where it is compiled. No contraction, so that results are the same
# on machines with and without a fused multiply-add.
CORE_OPTIONS = (
    *("-std=c++20", "-O3", "-g1", "-march=native", "-ffp-contract=off", "-fPIC"),
    *("-Wall", "-Wextra"),
)
# -fno-strict-aliasing: kernels reinterpret registers. Pattern: what is read unset is a huge number.
KERNEL_OPTIONS = (
    *("-std=c++20", "-O2", "-g", "-ffp-contract=off", "-fPIC", "-fno-strict-aliasing"),
    *("-fno-exceptions", "-fno-rtti", "-ftrivial-auto-var-init=pattern"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)
# The hooks that the compiler calls at every access are the core's own, not the sanitizer's.
RACE_OPTIONS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")

CACHE_BYTES = 300 << 20
IN_USE_SECONDS = 600  # what was used since then may be about to be loaded

lock = threading.RLock()  # the core knows one launch at a time and one set of buffers


def compiler() -> str:
    """Path of the C++ compiler; a RuntimeError if there is none."""
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError("g++ was not found; the emulator wants version 12 or later of it")
    return path


@cache
def _machine() -> str:
    """What decides code for this machine: compiler, its version, the processor's features."""
    version = subprocess.run(
        [compiler(), "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[0]
    features = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "\n".join([compiler(), version, platform.machine(), features])


@cache
def _own_texts() -> dict[str, str]:
    paths = sorted([*FOLDER.glob("src/*"), *FOLDER.glob("include/**/*.*")])
    return {path.relative_to(FOLDER).as_posix(): path.read_text() for path in paths}


def _key(*parts: object) -> str:
    text = repr((_machine(), sorted(_own_texts().items()), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folder() -> Path:
    shared = _compile.cache_dir()
    if shared is not None:
        try:
            (shared / "emulator").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return _compile._private_folder(str(error))
        if os.access(shared / "emulator", os.W_OK):
            return shared / "emulator"
    return _compile._private_folder("its folder is not writable")


def _compiled(path: Path, sources: list[str], options: Sequence[str], *link: str) -> Path:
    """Make a shared library unless it is there; another process never sees half a file.

    Compiling and linking are apart: with the sanitizer's option the linker would add its library.
    """
    try:
        os.utime(path)  # it was used: `prune` takes the others first
        return path
    except OSError:
        prune(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        objects = []
        for number, source in enumerate(sources):
            objects.append(f"{folder}/{number}.o")
            _call(path.stem, [compiler(), *options, "-c", source, "-o", objects[-1]])
        made = Path(folder) / path.name
        _call(path.stem, [compiler(), "-shared", "-o", str(made), *objects, *link])
        made.replace(path)
    return path


def prune(folder: Path, limit: int = CACHE_BYTES) -> None:
    """Delete what was not used for longest until the rest is within the limit.

    A process that has loaded a file keeps it; one that comes later compiles it again.
    """
    entries = []
    for path in folder.glob("[!.]*"):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        with contextlib.suppress(OSError):  # another process is deleting, too
            entries.append((path.stat().st_mtime, sum(p.stat().st_size for p in files), path))
    excess = sum(size for _, size, _ in entries) - limit
    for used, size, path in sorted(entries, key=lambda entry: entry[0]):
        if excess <= 0 or used > time.time() - IN_USE_SECONDS:
            break
        excess -= size
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _call(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} did not compile for the emulator\n{done.stderr}")


@cache
def core_path() -> Path:
    """The emulator itself, as a shared library."""
    path = _folder() / f"core-{_key(CORE_OPTIONS)}.so"
    sources = sorted(str(source) for source in FOLDER.glob("src/*.cpp"))
    return _compiled(path, sources, [*CORE_OPTIONS, f"-I{INCLUDE}"], "-ldl")


def _source_folder(sources: _sources.Sources | None) -> Path:
    """Where the kernels' sources lie; changed ones are written to the cache."""
    if sources is None:
        return _sources.kernel_root()
    folder = _folder() / f"sources-{_sources.digest(sources)[:32]}"
    if folder.is_dir():
        os.utime(folder)
    else:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
        for name, text in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def kernel_path(kernel: str, config: str, race: bool, sources: _sources.Sources | None) -> Path:
    """A kernel in one configuration, as a shared library beside the core."""
    texts = _sources.fingerprint() if sources is None else _sources.digest(sources)
    file, _, entry = kernel.partition(":")
    options = [*KERNEL_OPTIONS, *(RACE_OPTIONS if race else ())]
    root, core = _source_folder(sources), core_path()
    # Folders count, as debug information names them, and the core, which the library loads.
    places = (str(root), str(INCLUDE), core.name)
    path = _folder() / f"{entry or file}-{_key(texts, kernel, config, options, places)}.so"
    defines = [
        f"-DCUATTN_CONFIG={config}",
        f"-DEMULATED_FILE=<{file}.cu>",
        f"-DEMULATED_KERNEL={entry or file}",
    ]
    includes = ["-include", "emulator/cuda.h", f"-I{INCLUDE}", f"-I{root}"]
    entry_file = str(INCLUDE / "emulator" / "entry.cpp")
    return _compiled(path, [entry_file], [*options, *defines, *includes], "-Wl,-z,now", str(core))


@cache
def core() -> ctypes.CDLL:
    """The loaded emulator, its functions declared."""
    library = ctypes.CDLL(str(core_path()), mode=ctypes.RTLD_GLOBAL)
    library.emulator_allocate.restype = ctypes.c_void_p
    library.emulator_allocate.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.emulator_protect.argtypes = [ctypes.c_void_p]
    library.emulator_release.argtypes = [ctypes.c_void_p]
    library.emulator_message.restype = ctypes.c_char_p
    library.emulator_suspicions.restype = ctypes.c_char_p
    return library

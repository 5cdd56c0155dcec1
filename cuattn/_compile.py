"""Kernel name, configuration and target → cubin: NVRTC, behind a cache on disk.

Nothing here needs a GPU.  Two files stand in the cache for one compilation: a record, named by the
hash of everything that decides the result, and a cubin, named by the hash of its own bytes.  The
record is written last.  So processes may share the folder without a lock, and a file that was
damaged or cut short is noticed and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import _sources

# -fmad=false: a product and a sum are fused where the source says so and nowhere else, so that
# results do not change with the compiler.
OPTIONS = ("-std=c++20", "-fmad=false", "-lineinfo", "--ptxas-options=-v")

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_NOTE = re.compile(r"^.*\bC75\d\d\b.*$", re.MULTILINE)

_lock = threading.Lock()
_private: Path | None = None  # folder of this process alone, once one was needed


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and what the compiler said of it."""

    cubin: bytes
    log: str
    registers: int  # of the hungriest entry function
    spills: int  # bytes stored and loaded
    seconds: float

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines in which ptxas gave up a request of the source (C7508, C7511, …)."""
        return tuple(line.strip() for line in _NOTE.findall(self.log))


@dataclass(frozen=True, slots=True)
class Entry:
    """A compilation in the cache."""

    path: Path
    compiled: Compiled
    fresh: bool  # compiled by this call rather than found


def compile_kernel(
    kernel: str, config: str, arch: str, sources: _sources.Sources | None = None
) -> Compiled:
    """Compile `<kernel>.cu` for exactly `arch`; a RuntimeError carries the compiler's log."""
    nvrtc = _nvrtc()
    sources = _sources.read() if sources is None else sources
    file = f"{kernel}.cu"
    if file not in sources:
        known = ", ".join(sorted(name for name in sources if name.endswith(".cu"))) or "none"
        raise ValueError(f"kernel is {kernel!r}, but the CUDA sources hold no {file} ({known})")
    headers = [name for name in sources if name.endswith(".cuh")]
    options = [*OPTIONS, f"-arch={arch}", f"-DCUATTN_CONFIG={config}"]
    texts = [sources[name].encode() for name in headers]
    names = [name.encode() for name in headers]
    start = time.perf_counter()
    log = ""
    # NOTE: NVRTC keeps results of its own, and a hit there comes without the log that registers
    # and spills are read from: then compile again, past it.
    for more in ([], ["--no-cache"]):
        program = nvrtc.createProgram(sources[file], f"kernels/{file}", texts, names)
        try:
            nvrtc.compileProgram(program, (*options, *more))
            # NOTE: CuPy strips the last byte, which in a cubin is data (a zero).
            cubin = nvrtc.getCUBIN(program) + b"\0"
            log = nvrtc.getProgramLog(program).rstrip("\0\n")
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"kernel {kernel} with config {config!r} did not compile for {arch}: {error}\n"
                f"{nvrtc.getProgramLog(program)}"
            ) from error
        finally:
            nvrtc.destroyProgram(program)
        if _REGISTERS.search(log):
            break
    registers = max(map(int, _REGISTERS.findall(log)), default=0)
    spills = sum(map(int, _SPILLS.findall(log)))
    return Compiled(cubin, log, registers, spills, time.perf_counter() - start)


def cubin_path(
    kernel: str, config: str, arch: str, sources: _sources.Sources | None = None
) -> Path:
    """File that holds the cubin: from the cache, or compiled now."""
    return load(kernel, config, arch, sources).path


def load(kernel: str, config: str, arch: str, sources: _sources.Sources | None = None) -> Entry:
    """Find the cubin in the cache, or compile it and put it there."""
    stem = f"{kernel}-{arch}"
    key = _key(kernel, config, arch, sources)
    shared = cache_dir()
    for folder in (shared, _private):
        if folder is not None and (entry := _read(folder, stem, key)):
            return entry
    compiled = compile_kernel(kernel, config, arch, sources)
    reason = "there is no home folder"
    if shared is not None:
        try:
            return _write(shared, stem, key, compiled)
        except OSError as error:
            reason = str(error)
    return _write(_private_folder(reason), stem, key, compiled)


def cache_dir() -> Path | None:
    """Folder of the cache, made or not; None where it would lie in a home that does not exist."""
    if chosen := os.environ.get("CUATTN_CACHE_DIR"):
        return Path(chosen).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "cuattn"
    try:
        home = Path.home()
        return home / ".cache" / "cuattn" if home.is_dir() else None
    except (OSError, RuntimeError):  # a home behind a closed door; a user without one
        return None


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the compiler that CuPy found."""
    return _nvrtc().getVersion()


def _nvrtc() -> ModuleType:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise ImportError(
            "compiling a kernel needs CuPy: pip install 'cuattn[cuda13]', or 'cuattn[cuda12]' for "
            "a driver of CUDA 12"
        ) from error
    return nvrtc


def _key(kernel: str, config: str, arch: str, sources: _sources.Sources | None) -> str:
    texts = _sources.fingerprint() if sources is None else _sources.digest(sources)
    decides = [texts, kernel, config, arch, OPTIONS, nvrtc_version()]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _read(folder: Path, stem: str, key: str) -> Entry | None:
    """Return what `_write` left, or None if a file is missing or is not what was written."""
    try:
        record = json.loads((folder / f"{stem}-{key[:32]}.json").read_bytes())
        path = folder / f"{stem}-{record['cubin'][:32]}.cubin"
        cubin = path.read_bytes()
        if record["key"] != key or record["cubin"] != hashlib.sha256(cubin).hexdigest():
            return None
        known = (record["log"], record["registers"], record["spills"], record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(path, Compiled(cubin, *known), fresh=False)


def _write(folder: Path, stem: str, key: str, compiled: Compiled) -> Entry:
    folder.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256(compiled.cubin).hexdigest()
    path = folder / f"{stem}-{checksum[:32]}.cubin"
    record = {
        "key": key,
        "cubin": checksum,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "seconds": round(compiled.seconds, 3),
        "log": compiled.log,
    }
    _replace(path, compiled.cubin)
    _replace(folder / f"{stem}-{key[:32]}.json", json.dumps(record, indent=1).encode())
    return Entry(path, compiled, fresh=True)


def _replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` at once: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _private_folder(reason: str) -> Path:
    """Return a folder that dies with this process; the first call warns."""
    import atexit  # rarely needed, and `import cuattn` is to stay light
    import shutil
    import tempfile

    global _private
    with _lock:
        if _private is None:
            _private = Path(tempfile.mkdtemp(prefix="cuattn-"))
            atexit.register(shutil.rmtree, _private, ignore_errors=True)
            warnings.warn(
                f"the kernel cache cannot be written ({reason}), so every process will compile "
                "anew; set CUATTN_CACHE_DIR to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )
        return _private

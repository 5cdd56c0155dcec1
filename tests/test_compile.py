"""Compiling without a GPU: every shipped configuration, and the cache of cubins."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cupy")

from cuattn import _cli_compile, _compile, _heuristics, _hopper, _shipped, _sources
from cuattn._cli_compile import Job
from cuattn._config import FmhaConfig, FmhaHopperConfig

ROOT = Path(__file__).resolve().parent.parent
ROOM = _heuristics.SHARED_MEMORY["sm_90a"]

TINY = {
    "tiny.cu": """
#include <attention/config.cuh>
extern "C" __global__ void tiny(float* x) { x[threadIdx.x] = shift(x[threadIdx.x]); }
""",
    "attention/config.cuh": """
#pragma once
#include <core/mask.cuh>
struct Config { int a = 1; int b = 2; Mask mask = Mask::none; };
constexpr Config config{CUATTN_CONFIG};
__device__ float shift(float x) { return config.mask == Mask::none ? x : x * config.a + config.b; }
""",
    "core/mask.cuh": "#pragma once\nenum class Mask { none, causal };\n",
}
CONFIG = ".a=3, .b=4, .mask=Mask::causal"

# 96 values alive across a barrier, where 32 registers are allowed.
SPILLING = {
    "spilling.cu": """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float kept[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = kept[95 - i] * kept[i];
}
"""
}

SHIPPED = _cli_compile.shipped(_cli_compile.ARCHS)


# Part of what is shipped.  float16 differs from bfloat16 in the operand types of mma and cvt alone,
# which take no other registers: it is compiled where the head dimension is 128.  Prefill has all
# options for one target, for the others those that take the most registers.  Decode has half of its
# dimensions for the others.  sm_89 takes the registers of sm_86, in each of 82 configurations
# of the three attention kernels.
def compiled_here(job: Job) -> bool:
    """Say whether a shipped configuration is compiled here."""
    words = job.label.split()
    usual, half = "head_dim_qk=128" in words, "float16" in words
    options = {"paged", "soft_cap", "skip_softmax"} & set(words)
    if job.arch == "sm_89" and "head_dim_qk" in job.label and not (usual and not half):
        return False
    if job.kernel == "fmha_sm80":
        hungry = options in (
            set(),
            {"paged", "skip_softmax"},
            {"paged", "soft_cap", "skip_softmax"},
        )
        return usual or (not half and (job.arch == "sm_90a" or hungry))
    if job.kernel == "decode":
        here = job.arch == "sm_90a" or any(f"head_dim_qk={d}" in words for d in (64, 128, 256))
        return usual or (here and not half)
    if job.kernel == "mla_decode_sm80":  # shipped for sm_90a with lists of keys only
        if "skip_softmax" in words and job.arch not in ("sm_90a", "sm_120"):
            return False  # the two targets where registers are scarcest
        return not half and (job.arch == "sm_90a" or "sparse" not in words)
    return job.arch == "sm_90a" or not half or usual


JOBS = [job for job in SHIPPED if compiled_here(job)]


def sentence(job: Job) -> str:
    return f"{job.arch}-{job.kernel}-{job.label.replace(' ', '-')}"


def elf_end(cubin: bytes) -> int:
    """Where the headers of a 64-bit ELF file say that it ends."""
    program_headers, section_headers = struct.unpack_from("<QQ", cubin, 32)
    sizes = struct.unpack_from("<4H", cubin, 54)  # program entry, count; section entry, count
    return max(program_headers + sizes[0] * sizes[1], section_headers + sizes[2] * sizes[3])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache for this test alone."""
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_compile, "_private", None)
    return tmp_path / "cache"


@pytest.mark.parametrize("job", JOBS, ids=sentence)
def test_shipped_configuration_compiles_without_spills(job: Job) -> None:
    compiled = _compile.load(job.kernel, job.config, job.arch).compiled
    assert compiled.spills == 0, compiled.log
    assert not compiled.notes, compiled.log
    assert 0 < compiled.registers <= 255
    assert elf_end(compiled.cubin) == len(compiled.cubin)


# Each tile of Hopper's prefill kernel once; with every option where head dims are usual.  Pages are
# not for the tile of long full attention.
HOPPER = [
    replace(config, certificate=config.skip_softmax)
    for config in _shipped.hopper()
    if config.element == "bfloat16"
    and (config.paged, config.soft_cap, config.skip_softmax)
    in ((False,) * 3, *([(config.block_kv != 80, True, True)] if config.head_dim_qk == 128 else []))
]


@pytest.mark.parametrize("config", HOPPER, ids=lambda config: config.define())
def test_hopper_prefill_compiles_without_spills(config: FmhaHopperConfig) -> None:
    """168 registers at launch are 40 for the loader and 232 for each thread that computes."""
    compiled = _compile.load("fmha_sm90", config.define(), "sm_90a").compiled
    assert compiled.spills == 0 and not compiled.notes, compiled.log
    assert compiled.registers == (168 if config.consumers == 2 else 128)


@pytest.mark.parametrize(
    "job", [job for job in JOBS if job.kernel == "mla_decode_sm90"], ids=sentence
)
def test_warp_groups_of_mla_ask_for_no_more_registers_than_there_are(job: Job) -> None:
    """They share what the block has at launch; who asks for more than is left waits for ever."""
    compiled = _compile.load(job.kernel, job.config, job.arch).compiled
    source = _sources.read()["mla_decode_sm90.cu"]
    (scores,) = map(int, re.findall(r"registers_increase<(\d+)>", source))
    (weighs,) = map(int, re.findall(r"registers_decrease<(\d+)>", source))
    assert scores + 2 * weighs == 3 * compiled.registers


# Prefill with a certificate where there is no register to spare.
_PORTABLE = _heuristics.portable_tile(128, 128, False, "sm_90a", ROOM)[0]
_UNEQUAL = _heuristics.portable_tile(192, 128, True, "sm_90a", ROOM)[0]
CERTIFIED = [
    ("fmha_sm80", _PORTABLE),
    ("fmha_sm80", replace(_UNEQUAL, paged=True, soft_cap=True)),
    ("fmha_sm90", replace(_hopper.tile(64, 64, ROOM), paged=True, soft_cap=True)),
]


@pytest.mark.parametrize(("kernel", "tile"), CERTIFIED)
def test_certificates_compile_without_spills(
    kernel: str, tile: FmhaConfig | FmhaHopperConfig
) -> None:
    config = replace(tile, skip_softmax=True, certificate=True)
    compiled = _compile.load(kernel, config.define(), "sm_90a").compiled
    assert compiled.spills == 0 and not compiled.notes, compiled.log


def test_every_kernel_file_is_shipped_for_some_architecture() -> None:
    files = {name.removesuffix(".cu") for name in _sources.read() if name.endswith(".cu")}
    assert {job.kernel for job in JOBS} == {job.kernel for job in SHIPPED} == files


@pytest.fixture
def usual() -> Job:
    """Return the configuration of most models: bfloat16, head dimension 128, dense."""
    wanted = ("bfloat16", "head_dim_qk=128", "head_dim_v=128")
    flags = ("paged", "soft_cap", "skip_softmax")
    return next(
        job
        for job in JOBS
        if job.arch == "sm_90a"
        and all(word in job.label.split() for word in wanted)
        and not any(word in job.label.split() for word in flags)
    )


def test_first_call_compiles_quickly(usual: Job) -> None:
    seconds = []
    for _ in range(3):
        start = time.process_time()  # of this process alone: other tests run beside it
        _compile.compile_kernel(usual.kernel, usual.config, usual.arch)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 1.5, f"{sentence(usual)} took {min(seconds):.2f} s, wanted 1.5"


def test_from_disk_in_a_new_process_is_quick(folder: Path, usual: Job) -> None:
    code = (
        "import sys, time, cupy, cuattn; start = time.process_time(); "
        "from cuattn import _compile; _compile.cubin_path(*sys.argv[1:]); "
        "print(time.process_time() - start)"
    )
    seconds = []
    for _ in range(6):  # the first one fills the cache
        command = [sys.executable, "-c", code, usual.kernel, usual.config, usual.arch]
        seconds.append(float(subprocess.check_output(command, cwd=ROOT)))
    assert min(seconds[1:]) <= 0.020, f"{min(seconds[1:]) * 1e3:.1f} ms from disk, wanted 20"


def test_cubin_is_whole_and_for_the_target() -> None:
    compiled = _compile.compile_kernel("tiny", CONFIG, "sm_90a", TINY)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert elf_end(compiled.cubin) == len(compiled.cubin)
    assert "for 'sm_90a'" in compiled.log
    assert compiled.registers > 0
    assert compiled.spills == 0


def test_hit_in_the_compilers_own_cache_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC answers such a hit without a log, and so without registers and spills."""
    real = _compile._nvrtc()
    asked: list[tuple[str, ...]] = []

    def compile_program(program: int, options: tuple[str, ...]) -> None:
        asked.append(options)
        real.compileProgram(program, options)

    def program_log(program: int) -> str:
        return real.getProgramLog(program) if "--no-cache" in asked[-1] else ""

    caching = SimpleNamespace(**{name: getattr(real, name) for name in dir(real)})
    caching.compileProgram, caching.getProgramLog = compile_program, program_log
    monkeypatch.setattr(_compile, "_nvrtc", lambda: caching)
    compiled = _compile.compile_kernel("tiny", CONFIG, "sm_90a", TINY)
    assert ["--no-cache" in options for options in asked] == [False, True]
    assert compiled.registers > 0


def test_spills_are_seen() -> None:
    assert _compile.compile_kernel("spilling", "", "sm_90a", SPILLING).spills > 0


def test_notes_of_the_assembler_are_seen() -> None:
    log = "ptxas info    : 3 bytes gmem\nptxas info    : (C7511) Potential Performance Loss: …\n"
    compiled = _compile.Compiled(b"", log, 1, 0, 0.0)
    assert compiled.notes == ("ptxas info    : (C7511) Potential Performance Loss: …",)


def test_compile_error_says_what_and_why() -> None:
    with pytest.raises(RuntimeError) as caught:
        _compile.compile_kernel("tiny", ".a=3, .c=4", "sm_90a", TINY)
    message = str(caught.value)
    for part in ("tiny", ".a=3, .c=4", "sm_90a", 'has no field "c"', "attention/config.cuh"):
        assert part in message


def test_unknown_architecture_and_kernel_are_named() -> None:
    with pytest.raises(RuntimeError, match="sm_12345"):
        _compile.compile_kernel("tiny", CONFIG, "sm_12345", TINY)
    with pytest.raises(ValueError, match=r"'huge'.*tiny\.cu"):
        _compile.compile_kernel("huge", CONFIG, "sm_90a", TINY)


def test_second_load_is_from_disk(folder: Path) -> None:
    first = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    second = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    assert first.fresh
    assert not second.fresh
    assert first.path == second.path
    assert first.path.parent == folder
    assert first.path.read_bytes() == second.compiled.cubin == first.compiled.cubin
    assert second.compiled.registers == first.compiled.registers
    assert second.compiled.log == first.compiled.log


def test_key_is_everything_that_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(config: str = CONFIG, arch: str = "sm_90a", **changed: str) -> bool:
        return _compile.load("tiny", config, arch, TINY | changed).fresh

    assert fresh()
    assert not fresh()
    assert fresh(config=".a=3, .b=5")
    assert fresh(arch="sm_80")
    assert fresh(**{"core/mask.cuh": TINY["core/mask.cuh"] + "// changed\n"})
    assert fresh(**{"another.cuh": "#pragma once\n"})
    version = _compile.nvrtc_version()
    with monkeypatch.context() as patch:
        patch.setattr(_compile, "nvrtc_version", lambda: (version[0], version[1] + 1))
        assert fresh()
    with monkeypatch.context() as patch:
        patch.setattr(_compile, "OPTIONS", (*_compile.OPTIONS, "-DMORE"))
        assert fresh()
    assert not fresh()


def test_digest_keeps_names_and_texts_apart() -> None:
    assert _sources.digest({"a": "bc"}) != _sources.digest({"ab": "c"})
    assert _sources.digest({"a": "b", "c": "d"}) == _sources.digest({"c": "d", "a": "b"})
    assert _sources.fingerprint() == _sources.digest(_sources.read())


@pytest.mark.parametrize("suffix", ["json", "cubin"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "gone"])
def test_damaged_file_is_made_again(folder: Path, suffix: str, damage: str) -> None:
    whole = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    (path,) = folder.glob(f"*.{suffix}")
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]
        foreign = b'{"cubin": 3}'
        path.write_bytes(
            {"cut": content[:-9], "flipped": flipped, "empty": b"", "foreign": foreign}[damage]
        )
    mended = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    assert mended.path.read_bytes() == whole.compiled.cubin
    if (suffix, damage) != ("json", "flipped"):  # a flipped letter of the log changes nothing
        assert mended.fresh
    assert not _compile.load("tiny", CONFIG, "sm_90a", TINY).fresh


def test_processes_share_the_folder(folder: Path, tmp_path: Path) -> None:
    """Four start together, meet at a gate, and all want the same two cubins."""
    code = """
import pathlib, sys, time
from cuattn import _compile
_compile.nvrtc_version()
gate = pathlib.Path(sys.argv[1])
(gate / sys.argv[2]).touch()
while len(list(gate.iterdir())) < 4:
    time.sleep(0.001)
for arch in ("sm_80", "sm_90a"):
    entry = _compile.load("tiny", sys.argv[3], arch, eval(sys.argv[4]))
    assert entry.path.read_bytes() == entry.compiled.cubin
"""
    gate = tmp_path / "gate"
    gate.mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", code, gate, str(i), CONFIG, repr(TINY)], cwd=ROOT)
        for i in range(4)
    ]
    assert [process.wait() for process in started] == [0] * 4
    assert sorted(path.suffix for path in folder.iterdir()) == [
        ".cubin",
        ".cubin",
        ".json",
        ".json",
    ]
    assert not _compile.load("tiny", CONFIG, "sm_80", TINY).fresh
    assert not _compile.load("tiny", CONFIG, "sm_90a", TINY).fresh


def test_unwritable_folder_falls_back_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setattr(_compile, "_private", None)
    with pytest.warns(RuntimeWarning, match="CUATTN_CACHE_DIR"):
        first = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = _compile.load("tiny", CONFIG, "sm_90a", TINY)
        other = _compile.load("tiny", CONFIG, "sm_80", TINY)
    assert first.fresh
    assert not again.fresh
    assert other.fresh
    assert first.path.read_bytes() == again.compiled.cubin
    assert first.path.parent == other.path.parent
    assert first.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_still_serves(folder: Path) -> None:
    filled = _compile.load("tiny", CONFIG, "sm_90a", TINY)
    folder.chmod(0o500)
    try:
        assert _compile.load("tiny", CONFIG, "sm_90a", TINY).path == filled.path
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert _compile.load("tiny", CONFIG, "sm_80", TINY).path.parent != folder
    finally:
        folder.chmod(0o700)


def test_folder_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _compile.cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("CUATTN_CACHE_DIR")
    assert _compile.cache_dir() == tmp_path / "xdg" / "cuattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _compile.cache_dir() == tmp_path / ".cache" / "cuattn"
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert _compile.cache_dir() is None


def test_missing_home_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    monkeypatch.setattr(_compile, "_private", None)
    with pytest.warns(RuntimeWarning, match="no home folder"):
        path = _compile.cubin_path("tiny", CONFIG, "sm_90a", TINY)
    assert path.is_file()
    assert not (tmp_path / "missing").exists()

"""The CUDA sources: where they are, what they say, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

Sources = Mapping[str, str]  # "fmha_sm80.cu", "attention/mask.cuh", … → text


@cache
def kernel_root() -> Path:
    """Folder of the kernels: `cuattn/kernels` when installed, `kernels` of a checkout otherwise."""
    package = Path(__file__).resolve().parent
    candidates = (package / "kernels", package.parent / "kernels")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no CUDA sources: neither {candidates[0]} nor {candidates[1]} exists")


@cache
def read() -> Sources:
    """Return the text of every `.cu` and `.cuh` file under its name relative to the root."""
    root = kernel_root()
    paths = sorted(path for path in root.rglob("*.cu*") if path.suffix in (".cu", ".cuh"))
    return MappingProxyType(
        {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    )


def digest(sources: Sources) -> str:
    """Hash names and texts; their lengths are hashed too, so that no two sets run together."""
    total = hashlib.sha256()
    for name in sorted(sources):
        for part in (name.encode(), sources[name].encode()):
            total.update(len(part).to_bytes(8, "little"))
            total.update(part)
    return total.hexdigest()


@cache
def fingerprint() -> str:
    """`digest` of the sources that `read` returns."""
    return digest(read())

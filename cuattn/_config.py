"""What is fixed when a kernel is compiled.  Twin of kernels/attention/config.cuh."""

from __future__ import annotations

from dataclasses import dataclass, fields

STAGES = 2  # tiles of K and V in flight, fmha_sm80.cu
CHUNK = 64  # columns of one swizzled chunk of shared memory, tile/swizzle.cuh


@dataclass(frozen=True, slots=True)
class FmhaConfig:
    """Configuration of a prefill kernel; defaults are those of the C++ struct."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    head_dim_qk: int = 128
    head_dim_v: int = 128
    block_q: int = 128
    block_kv: int = 64
    rows_per_warp: int = 32
    paged: bool = False
    soft_cap: bool = False
    skip_softmax: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block_q // self.rows_per_warp * 32

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory of a block: Q, and a ring of K and V tiles."""
        qk, v = (-(-dim // CHUNK) * CHUNK * 2 for dim in (self.head_dim_qk, self.head_dim_v))
        return self.block_q * qk + STAGES * self.block_kv * (qk + v)

    def define(self) -> str:
        """Return the designated initialisers that stand behind ``-DCUATTN_CONFIG=``."""
        return ", ".join(f".{f.name}={_literal(getattr(self, f.name))}" for f in fields(self))


def _literal(value: str | int | bool) -> str:
    if isinstance(value, str):
        return f"Dtype::{value}"
    return str(value).lower()

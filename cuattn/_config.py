"""What is fixed when a kernel is compiled.  Twin of kernels/attention/config.cuh."""

from __future__ import annotations

from dataclasses import dataclass, fields

STAGES = 2  # tiles of K and V in flight, fmha_sm80.cu, fmha_sm90.cu; slots of a warp, decode.cu
GROUP_ROWS = 64  # query rows of a warp-group
GROUP_THREADS = 128
LOST_BYTES = 8  # of a thread, attention/certificate.cuh
CHUNK = 64  # columns of one swizzled chunk of shared memory, tile/swizzle.cuh


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """What a kernel is compiled with: the fields of its C++ struct, by the same names."""

    def define(self) -> str:
        """Return the designated initialisers that stand behind ``-DCUATTN_CONFIG=``."""
        return ", ".join(f".{f.name}={_literal(getattr(self, f.name))}" for f in fields(self))


@dataclass(frozen=True, slots=True)
class FmhaConfig(KernelConfig):
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
    certificate: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block_q // self.rows_per_warp * 32

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory of a block: Q, a ring of K and V tiles, and what rows lost."""
        qk, v = _row_bytes(self.head_dim_qk), _row_bytes(self.head_dim_v)
        lost = self.threads * LOST_BYTES if self.certificate else 0
        return self.block_q * qk + STAGES * self.block_kv * (qk + v) + lost


@dataclass(frozen=True, slots=True)
class FmhaHopperConfig(KernelConfig):
    """Configuration of Hopper's prefill kernel."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    head_dim_qk: int = 128
    head_dim_v: int = 128
    consumers: int = 2
    block_kv: int = 128
    q_in_registers: bool = True
    paged: bool = False
    soft_cap: bool = False
    skip_softmax: bool = False
    certificate: bool = False

    @property
    def block_q(self) -> int:
        """Query rows of an item: 64 to each warp-group that computes."""
        return self.consumers * GROUP_ROWS

    @property
    def threads(self) -> int:
        """Threads of a block: one warp-group more, which loads."""
        return (self.consumers + 1) * 128

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: Q, rings of K and V tiles, items, votes and barriers."""
        qk, v = _row_bytes(self.head_dim_qk), _row_bytes(self.head_dim_v)
        rest = 2 * 32 + self.consumers * 2 * 16 + (4 * STAGES + 3) * 8
        if self.certificate:
            rest += self.consumers * GROUP_THREADS * LOST_BYTES
        return self.block_q * qk + STAGES * self.block_kv * (qk + v) + rest


@dataclass(frozen=True, slots=True)
class DecodeConfig(KernelConfig):
    """Configuration of paged decode."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    head_dim_qk: int = 128
    head_dim_v: int = 128
    rows: int = 16
    block_kv: int = 32
    warps: int = 4
    blocks: int = 2
    soft_cap: bool = False
    skip_softmax: bool = False
    masses: bool = False
    mass_rule: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: Q, the warps' rings, their rows, seeds and counts."""
        qk, v = _row_bytes(self.head_dim_qk), _row_bytes(self.head_dim_v)
        rings = self.warps * STAGES * self.block_kv * max(qk, v)
        rows = self.warps * self.rows
        return self.rows * qk + rings + rows * 16 + rows * 8 + (self.warps + 1) * 4


@dataclass(frozen=True, slots=True)
class MergeSplitsConfig(KernelConfig):
    """Configuration of the kernel that merges splits: rows of decode's blocks, columns of O."""

    output: str = "bfloat16"
    rows: int = 64
    columns: int = 512
    sparse: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block: a warp to 128 columns."""
        return self.columns // 128 * 32


@dataclass(frozen=True, slots=True)
class MlaConfig(KernelConfig):
    """Configuration of MLA decode."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    page_size: int = 64
    sparse: bool = False
    skip_softmax: bool = False
    masses: bool = False
    mass_rule: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block: three warp-groups."""
        return 384

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: three tiles of latent columns, Q's and K's last ones, P, and rows."""
        return 232_160


@dataclass(frozen=True, slots=True)
class MlaPortableConfig(KernelConfig):
    """Configuration of portable MLA decode."""

    element: str = "bfloat16"
    output: str = "bfloat16"
    latent: int = 512
    rope: int = 64
    rows: int = 16
    rows_per_warp: int = 16
    block_kv: int = 64
    stages: int = 2
    warps: int = 8
    sparse: bool = False
    skip_softmax: bool = False
    masses: bool = False
    mass_rule: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32

    @property
    def shared_memory(self) -> int:
        """Bytes of a block: tiles, what of Q is in no register, P, maxima and sums, a word."""
        parts = self.warps // (self.rows // self.rows_per_warp)
        steps = (self.latent + self.rope) // 16
        most_kept = 16 if self.skip_softmax and self.block_kv == 32 else 24
        kept = 0 if self.rows_per_warp > 16 else min(steps, most_kept)
        q = self.rows * _row_bytes(16 * (steps - kept))
        ring = self.stages * self.block_kv * _row_bytes(self.latent + self.rope)
        return ring + q + self.rows * _row_bytes(self.block_kv) + 2 * parts * self.rows * 4 + 4


def _row_bytes(head_dim: int) -> int:
    """Bytes of a row in shared memory."""
    return -(-head_dim // CHUNK) * CHUNK * 2


def _literal(value: str | int | bool) -> str:
    if isinstance(value, str):
        return f"Dtype::{value}"
    return str(value).lower()

"""What the card itself reaches in this run: the figures that shares are taken of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuattn._workloads import Stopwatch

from .report import Row, say

COPY_BYTES = 2 << 30
MATRIX = 8192

READ_ALL = r"""
// Read every vector once; write nothing, but so that no compiler can know.
extern "C" __global__ void read_all(const uint4* vectors, unsigned long long count,
                                    unsigned* never) {
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned mixed = 0;
#pragma unroll 8
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const uint4 vector = vectors[i];
    mixed += vector.x ^ vector.y ^ vector.z ^ vector.w;
  }
  if (mixed == 0x9e3779b9u && count == 1) never[0] = mixed;
}
"""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """TFLOP/s of a large bfloat16 matrix product, None when no library can do one; GB/s read."""

    matrix_tflops: float | None
    read_gbps: float | None = None

    def share(self, tflops: float | None) -> float | None:
        """Part of the matrix product's rate."""
        return tflops / self.matrix_tflops if tflops and self.matrix_tflops else None

    def share_of_read(self, gbps: float | None) -> float | None:
        """Part of the rate of a plain reduction, which is no limit: others may read faster."""
        return gbps / self.read_gbps if gbps and self.read_gbps else None


def measure(group: str, watch: Stopwatch) -> tuple[Ceilings, list[Row]]:
    """Copy, read and multiply; print one line each."""
    rows = [_copy(group, watch), _read(group, watch)]
    product = _multiply(group, watch)
    rows += [product] if product else []
    for row in rows:
        figure = f"{row.gbps:8.0f} GB/s" if row.gbps else f"{row.tflops:8.0f} TFLOP/s"
        say(f"ceiling   {row.name:22}{row.impl:8}{figure}")
    return Ceilings(product.tflops if product else None, rows[1].gbps), rows


def _copy(group: str, watch: Stopwatch) -> Row:
    import cupy

    source = cupy.arange(COPY_BYTES // 4, dtype=cupy.uint32)
    target = cupy.empty_like(source)
    ms = watch.median_ms(lambda: target.data.copy_from_device_async(source.data, COPY_BYTES))
    return Row(group, "ceiling_copy", "cupy", ms=ms, gbps=2 * COPY_BYTES / ms * 1e-6)


def _read(group: str, watch: Stopwatch) -> Row:
    import cupy

    source = cupy.arange(COPY_BYTES // 4, dtype=cupy.uint32)
    never = cupy.zeros(1, dtype=cupy.uint32)
    kernel = cupy.RawKernel(READ_ALL, "read_all")
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    arguments: tuple[Any, ...] = (source, cupy.uint64(COPY_BYTES // 16), never)
    ms = watch.median_ms(lambda: kernel((blocks,), (256,), arguments))
    return Row(group, "ceiling_read", "cupy", ms=ms, gbps=COPY_BYTES / ms * 1e-6)


def _multiply(group: str, watch: Stopwatch) -> Row | None:
    try:
        import torch
    except ImportError:
        return None
    left, right = (
        torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    ms = watch.median_ms(lambda: torch.matmul(left, right, out=out))
    tflops = 2.0 * MATRIX**3 / ms * 1e-9
    return Row(group, "ceiling_matrix_8192", "torch", ms=ms, tflops=tflops)

"""Attention for any CUDA array: CuPy raw kernels, no framework, skip-softmax included.

Arrays of CuPy, PyTorch, JAX and whatever else speaks DLPack go in, CuPy arrays come out.  Importing
this package imports neither CuPy nor any framework.
"""

from .prefill import prefill, prefill_paged, prefill_ragged
from .skip_softmax import SkipSoftmax, SkipStats

__version__ = "0.1.0"

__all__ = [
    "SkipSoftmax",
    "SkipStats",
    "__version__",
    "prefill",
    "prefill_paged",
    "prefill_ragged",
]

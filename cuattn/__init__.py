"""Attention for any CUDA array: CuPy raw kernels, no framework, skip-softmax included.

Arrays of CuPy, PyTorch, JAX and whatever else speaks DLPack go in, CuPy arrays come out.  Importing
this package imports neither CuPy nor any framework.  `cuattn.emulator` runs the kernels on a CPU.
"""

from typing import Any

from ._validate import validate
from .append import append_kv, append_mla_kv
from .decode import decode
from .merge import merge_states
from .mla import mla_decode
from .prefill import prefill, prefill_paged, prefill_ragged
from .skip_softmax import SkipSoftmax, SkipStats

__version__ = "0.1.0"

__all__ = [
    "SkipSoftmax",
    "SkipStats",
    "__version__",
    "append_kv",
    "append_mla_kv",
    "decode",
    "merge_states",
    "mla_decode",
    "prefill",
    "prefill_paged",
    "prefill_ragged",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "emulator":  # imported when it is asked for
        import importlib

        return importlib.import_module(".emulator", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

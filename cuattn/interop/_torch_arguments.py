"""Arguments of the functions on tensors: checked, and made into those of operators."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cuattn

from ._torch_operators import Options


class SkipStats(cuattn.SkipStats):
    """Counters of tile votes in a tensor, which operators and `torch.compile` can see.

    The tensor is made at the first call that counts. In a compiled function that is a graph of its
    own, which the second call leaves for good; call the function once beforehand, uncompiled, or
    give the sizes here, to spare it.

    Parameters
    ----------
    batch, heads : int, optional
        Requests and query heads of the calls that will count.
    device : device, optional
        Where they will run.

    Examples
    --------
    >>> import torch, cuattn, cuattn.interop.torch as attention            # doctest: +SKIP
    >>> skip = cuattn.SkipSoftmax(threshold=0.01, stats=attention.SkipStats())  # doctest: +SKIP
    >>> q = torch.randn(1, 512, 8, 64, device="cuda").half()               # doctest: +SKIP
    >>> out = attention.prefill(q, q, q, skip_softmax=skip)                # doctest: +SKIP
    >>> skip.stats.visited > 0                                             # doctest: +SKIP
    True
    """

    def __init__(
        self, batch: int | None = None, heads: int | None = None, device: Any = None
    ) -> None:
        super().__init__()
        if batch is not None and heads is not None and device is not None:
            self.counts(batch, heads, torch.empty(0, device=device).device)
            self._used = False
        elif not batch is heads is device is None:
            raise TypeError(
                f"SkipStats has batch={batch!r}, heads={heads!r} and device={device!r}; wanted all "
                "three or none"
            )

    def _zeros(self, shape: tuple[int, ...], device: Any) -> Tensor:
        if not isinstance(device, torch.device):
            raise TypeError(
                "skip_softmax.stats is a cuattn.interop.torch.SkipStats; wanted a "
                "cuattn.SkipStats, or a call of cuattn.interop.torch"
            )
        made = torch.zeros(shape, dtype=torch.int64, device=device)
        if made.is_cuda and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(made)  # else compiled code that counts gets no graph
        return made

    def _read(self) -> np.ndarray:
        if self._counts is None:
            return np.zeros((3, 0, 0), np.int64)
        return np.array(self._counts.cpu().numpy())


def check_tensors(**tensors: Any) -> None:
    """Raise TypeError for what is no tensor, ValueError for what would want a gradient."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; wanted a torch.Tensor")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad; wanted torch.no_grad(), torch.inference_mode() or "
                f"{name}.detach(), since cuattn has no derivatives"
            )


def number(name: str, value: Any) -> tuple[float | None, Tensor | None]:
    """Return a number, or a tensor in its place."""
    if value is None or isinstance(value, Tensor):
        return None, value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; wanted a number or a torch.Tensor")
    return float(value), None


def options(
    q: Tensor,
    batch: int,
    *,
    window_left: int,
    scale: Any,
    out_scale: Any,
    soft_cap: float,
    sinks: Tensor | None,
    skip: Any,
    return_lse: bool,
    out_dtype: torch.dtype | None,
) -> Options:
    """Return the options of an operator on `batch` requests."""
    threshold: tuple[float | None, Tensor | None] = (None, None)
    factor = bound = seeds = counts = None
    unsafe = certificate = False
    if skip is not None:
        if not isinstance(skip, cuattn.SkipSoftmax):
            raise TypeError(f"skip_softmax is a {type(skip).__name__}; wanted a SkipSoftmax")
        threshold = number("skip_softmax.threshold", skip.threshold)
        factor, bound = skip.threshold_scale_factor, skip.max_dropped_mass
        unsafe, certificate, seeds = skip.unsafe, skip.certificate, skip.seeds
        if skip.stats is not None:
            if not isinstance(skip.stats, SkipStats):
                raise TypeError(
                    "skip_softmax.stats is a cuattn.SkipStats; wanted a "
                    "cuattn.interop.torch.SkipStats, whose counters are a tensor"
                )
            counts = skip.stats.counts(batch, q.shape[-2], q.device)
    scales = (*number("scale", scale), *number("out_scale", out_scale))
    check_tensors(scale=scales[1], out_scale=scales[3], sinks=sinks)
    check_tensors(**{"skip_softmax.threshold": threshold[1], "skip_softmax.seeds": seeds})
    return Options(
        window_left,
        *scales,
        float(soft_cap),
        sinks,
        *threshold,
        None if factor is None else float(factor),
        None if bound is None else float(bound),
        unsafe,
        certificate,
        seeds,
        counts,
        return_lse,
        out_dtype,
    )


def cache(kv_cache: Any) -> tuple[Tensor, Tensor | None]:
    """Return a cache of 5 axes and None, or keys and values."""
    if not isinstance(kv_cache, (tuple, list)):
        check_tensors(kv_cache=kv_cache)
        return kv_cache, None
    if len(kv_cache) != 2:
        raise TypeError(
            f"kv_cache is a {type(kv_cache).__name__} of {len(kv_cache)}; wanted a pair (k, v) of "
            "4-D tensors or one tensor [pages, 2, …]"
        )
    k, v = kv_cache
    check_tensors(**{"kv_cache (k)": k, "kv_cache (v)": v})
    return k, v

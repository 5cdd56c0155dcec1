"""Skip-softmax: what to leave out, and how much was left out.

The rule is BLASST's (arXiv 2512.12087): a tile of keys is left out when, for every query row that
votes on it, its largest score is below the row's running maximum by more than ``-ln λ``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ._records import HOST

PLANES = ("visited", "skipped", "ineligible")


class SkipStats:
    """Device counters of tile votes, per request and query head.

    A vote of rows of several heads counts for each of them. They are made at the first call that
    uses them, add up over calls until `reset`, and are read back (which waits for the device) only
    when a property is asked for.

    Examples
    --------
    >>> import cuattn
    >>> stats = cuattn.SkipStats()
    >>> skip = cuattn.SkipSoftmax(threshold=1e-3, stats=stats)
    >>> stats.visited, stats.skipped, stats.rate
    (0, 0, 0.0)
    """

    def __init__(self) -> None:
        self._counts: Any = None  # uint64 [visited, skipped, ineligible][batch, heads]
        self._place: tuple[int, int, int] | None = None  # batch, heads, device
        self._used = False  # since the last reset

    @property
    def visited(self) -> int:
        """Votes taken: groups of rows times tiles with a key that one of the rows sees."""
        return int(self._read()[0].sum())

    @property
    def skipped(self) -> int:
        """Votes that left the tile out."""
        return int(self._read()[1].sum())

    @property
    def ineligible(self) -> int:
        """Votes of requests that ran without skipping because their λ was not below 1."""
        return int(self._read()[2].sum())

    @property
    def rate(self) -> float:
        """Skipped over visited; 0 when nothing was visited."""
        visited, skipped, _ = (int(plane.sum()) for plane in self._read())
        return skipped / visited if visited else 0.0

    def per_head(self) -> dict[str, np.ndarray]:
        """Return ``{"visited", "skipped", "ineligible"}``, each int64 ``[batch, q heads]``."""
        return dict(zip(PLANES, self._read(), strict=True))

    def reset(self) -> None:
        """Set all counts to 0, where they are: a captured graph goes on adding to them.

        The next call may have another batch size or number of heads; it then gets other counters.
        """
        if self._counts is not None:
            self._counts[...] = 0
        self._used = False

    def counts(self, batch: int, heads: int, device: int) -> Any:
        """Return the device array ``[3, batch, heads]``, made of zeros if there is none yet."""
        place = (batch, heads, device)
        if self._counts is None or (self._place != place and not self._used):
            self._counts = self._zeros((len(PLANES), batch, heads), device)
            self._place = place
        elif self._place != place:
            raise ValueError(
                f"skip_softmax.stats counts (batch, heads, device) = {self._place}; wanted "
                f"{place}, so call its reset() first"
            )
        self._used = True
        return self._counts

    def _zeros(self, shape: tuple[int, ...], device: int) -> Any:
        """Make counters on a device; on the host, where the emulator counts, a NumPy array."""
        if device == HOST:
            return np.zeros(shape, np.uint64)
        import cupy

        with cupy.cuda.Device(device):
            return cupy.zeros(shape, np.uint64)

    def _read(self) -> np.ndarray:
        if self._counts is None:
            return np.zeros((len(PLANES), 0, 0), np.int64)
        if isinstance(self._counts, np.ndarray):
            return self._counts.astype(np.int64)
        self._counts.device.synchronize()
        return self._counts.get().astype(np.int64)


@dataclass(frozen=True)
class SkipSoftmax:
    """Leave out tiles of keys whose weights would be negligible.

    Exactly one of the first three says what is negligible.

    Parameters
    ----------
    threshold : float or array, optional
        λ: a tile is left out when all its weights are below λ times the largest weight so far.
        A float32 array on the device, ``[batch]`` or ``[batch, q heads]``, is read live: its values
        may change between replays of a CUDA graph.  0 skips nothing.
    threshold_scale_factor : float, optional
        λ = factor / kv_len of each request, as in FlashInfer and TensorRT-LLM.  0 skips nothing.  A
        request with ``kv_len <= factor`` would have λ ≥ 1: it runs without skipping and is counted
        as ineligible.
    max_dropped_mass : float, optional
        ε: every query row of decode keeps at least 1 − ε of its softmax weight, whatever the data.
        Tiles are left out as long as that is certain; nothing is to be calibrated.
    unsafe : bool
        Allow λ ≥ 1, which may drop everything after the first tile.
    stats : SkipStats, optional
        Counters to add to.
    certificate : bool
        Return how much of its weight every row lost, as one more result: float32 of LSE's shape,
        behind LSE if that is asked for. Of decode and MLA decode it is the share itself; of prefill
        an upper bound of it, typically several times as large, see Notes.
    seeds : array, optional
        Decode only: what is known of every row's largest score over all keys, wherever they are: a
        number that it is not below, −∞ for nothing. Float32 on the device, q's shape but for its
        last axis, contiguous, read live; final scores, so after scale and soft cap. Tiles are
        judged by these, too, where keys of the same rows lie elsewhere. Not with
        `max_dropped_mass`, which counts the weights of the keys that are here.

    Notes
    -----
    Which rows vote together and how many keys a tile has is part of each kernel's plan, so λ cannot
    be carried from one kernel to another: ``python -m cuattn info --plan`` prints it.

    The share δ that a row lost bounds its error: with v the longest of its values, the output is
    off by at most ``2·δ·|v|``. Prefill never weighs the keys that it leaves out. It takes each for
    as heavy as the heaviest of its tile that the row sees: with n such keys in a tile, m the row's
    maximum over kept keys and l the row sum relative to it (sink included),
    ``u = Σ n·exp(tile maximum − m)`` over tiles left out, and ``δ ≤ u / (u + l)``. What is returned
    is 1/256 larger, which covers all rounding for logits up to 4096 and 131072 keys; it is at most
    1, and 0 only for a row that lost nothing.

    References
    ----------
    BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv 2512.12087.

    Examples
    --------
    >>> import cuattn
    >>> cuattn.SkipSoftmax(threshold_scale_factor=1000.0).threshold_scale_factor
    1000.0
    """

    threshold: Any = None
    threshold_scale_factor: float | None = None
    max_dropped_mass: float | None = None
    unsafe: bool = False
    stats: SkipStats | None = None
    certificate: bool = False
    seeds: Any = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("threshold", "threshold_scale_factor", "max_dropped_mass")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"SkipSoftmax has {' and '.join(given) or 'no threshold'}; wanted exactly one of "
                "threshold, threshold_scale_factor and max_dropped_mass"
            )
        for name in ("unsafe", "certificate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; wanted True or False")
        if self.stats is not None and not isinstance(self.stats, SkipStats):
            raise TypeError(f"stats is a {type(self.stats).__name__}; wanted a SkipStats")
        self._check_seeds()
        value = getattr(self, given[0])
        if given[0] == "threshold" and not isinstance(value, Real):
            if isinstance(value, (str, bytes, list, tuple, dict)):
                raise TypeError(
                    f"threshold is a {type(value).__name__}; wanted a number or a float32 array on "
                    "the device"
                )
            return  # a live array: its shape is checked against each call
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{given[0]} is {value!r}; wanted a number")
        if not math.isfinite(value) or float(value) < 0:
            raise ValueError(f"{given[0]} is {value!r}; wanted a finite number ≥ 0")
        if given[0] == "max_dropped_mass" and float(value) >= 1:
            raise ValueError(f"max_dropped_mass is {value!r}; wanted below 1")
        if given[0] == "threshold" and float(value) >= 1 and not self.unsafe:
            raise ValueError(
                f"threshold is {value!r}; wanted below 1, or unsafe=True, since λ ≥ 1 may drop "
                "every tile after the first"
            )

    def _check_seeds(self) -> None:
        if self.seeds is None:
            return
        if isinstance(self.seeds, (Real, str, bytes, list, tuple, dict)):
            raise TypeError(
                f"seeds is a {type(self.seeds).__name__}; wanted a float32 array on the device"
            )
        if self.max_dropped_mass is not None:
            raise ValueError(
                f"SkipSoftmax has seeds and max_dropped_mass={self.max_dropped_mass!r}; wanted "
                "seeds with a threshold only"
            )


SkipKey = tuple[str, bool, float, bool, bool]  # source, unsafe, number, counted, certificate


def skip_key_of(skip: SkipSoftmax | None) -> SkipKey | None:
    """Return what of a skip option decides the launch; None: the dense kernel."""
    if skip is None:
        return None
    counted, certificate = skip.stats is not None, skip.certificate
    factor, bound = skip.threshold_scale_factor, skip.max_dropped_mass
    if factor is not None:
        if factor == 0 and not counted and not certificate:
            return None
        return "scale_factor", skip.unsafe, float(factor), counted, certificate
    if bound is not None:
        return "dropped_mass", skip.unsafe, float(bound), counted, certificate
    if isinstance(skip.threshold, (int, float, np.number)):
        return "threshold", skip.unsafe, float(skip.threshold), counted, certificate
    return "thresholds", skip.unsafe, 0.0, counted, certificate

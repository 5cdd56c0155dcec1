"""The configurations that are compiled before anyone calls them: `python -m cuattn compile`."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from . import _heuristics, _hopper
from ._config import (
    DecodeConfig,
    FmhaConfig,
    FmhaHopperConfig,
    MergeSplitsConfig,
    MlaConfig,
    MlaPortableConfig,
)

Config = (
    FmhaConfig | FmhaHopperConfig | DecodeConfig | MlaConfig | MlaPortableConfig | MergeSplitsConfig
)

ELEMENTS = ("bfloat16", "float16")
HEAD_DIMS = (*((dim, dim) for dim in _heuristics.HEAD_DIMS), (192, 128))
HOPPER_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def hopper() -> list[FmhaHopperConfig]:
    """Return the configurations of Hopper's prefill kernel that are worth compiling early."""
    room = _heuristics.SHARED_MEMORY["sm_90a"]
    tiles = [_hopper.tile(qk, v, room) for qk, v in HOPPER_HEAD_DIMS]
    tall = _hopper.tile(128, 128, room, tall=True)  # which whole sequences alone get
    return [
        replace(
            tile,
            element=element,
            output=element,
            paged=paged,
            soft_cap=soft_cap,
            skip_softmax=skip,
        )
        for tile, element, paged, soft_cap, skip in product(
            (*tiles, tall), ELEMENTS, (False, True), (False, True), (False, True)
        )
        if not (paged and tile is tall)
    ]


def configs(arch: str) -> list[tuple[str, Config]]:
    """Return the configurations that `python -m cuattn compile` makes for one target.

    Compiled at first use: unequal head dimensions other than 192/128, outputs of another dtype than
    the inputs, the certificate of a threshold; of decode, more than 16 rows, many short items, a
    soft cap with skipping; of MLA, on Hopper pages of other than 64 tokens and
    skipping in lists, and elsewhere a bound of the dropped mass, 17 to 32 rows and all but a latent
    part of 512 and a rope part of 64.
    """
    shared_memory = _heuristics.SHARED_MEMORY[arch]
    prefill = [
        replace(
            _heuristics.portable_tile(qk, v, soft_cap, arch, shared_memory)[0],
            element=element,
            output=element,
            paged=paged,
            soft_cap=soft_cap,
            skip_softmax=skip,
        )
        for (qk, v), element, paged, soft_cap, skip in product(
            HEAD_DIMS, ELEMENTS, (False, True), (False, True), (False, True)
        )
    ]
    dense: dict[str, bool] = {}
    mass_rule = {"skip_softmax": True, "masses": True, "mass_rule": True}
    decode = [
        replace(
            _heuristics.decode_tile(qk, v, 16, _heuristics.WARPS, shared_memory),
            element=element,
            output=element,
            **kind,
        )
        for (qk, v), element, kind in product(
            HEAD_DIMS,
            ELEMENTS,
            (dense, {"soft_cap": True}, {"skip_softmax": True}, mass_rule),
        )
    ]
    hopper_prefill: list[FmhaHopperConfig] = []
    if arch == "sm_90a":  # where it is not chosen by itself: one, for those who choose it
        hopper_prefill = hopper() if _heuristics.HOPPER_PREFILL else [FmhaHopperConfig()]
    mla: list[tuple[str, Config]] = []
    for element in ELEMENTS if arch == "sm_90a" else ():
        mla += [
            (_heuristics.MLA_HOPPER, MlaConfig(element, element, **kind))
            for kind in (dense, {"skip_softmax": True}, mass_rule, {"sparse": True})
        ]
        mla += [("merge_splits", MergeSplitsConfig(element, sparse=x)) for x in (False, True)]
    portable = [
        replace(
            _heuristics.mla_tile(512, 64, rows, shared_memory),
            element=element,
            output=element,
            sparse=sparse,
            skip_softmax=skip,
        )
        for rows, element, sparse, skip in product((16, 64), ELEMENTS, (False, True), (False, True))
        if arch != "sm_90a" or (sparse and rows == 16)
    ]
    return [
        *(("fmha_sm80", config) for config in prefill),
        *((_heuristics.HOPPER_KERNEL, config) for config in hopper_prefill),
        *(("decode", config) for config in decode),
        *mla,
        *((_heuristics.MLA_PORTABLE, config) for config in portable),
    ]

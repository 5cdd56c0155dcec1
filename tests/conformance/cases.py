"""All cases, and which wrappers none of them covers."""

from __future__ import annotations

import re

from cuattn import _sources

from . import copies, exchange, hopper, products, warps
from .case import Case

ALL: tuple[Case, ...] = (
    *warps.CASES,
    *exchange.CASES,
    *copies.CASES,
    *products.CASES,
    *hopper.CASES,
)
FAMILIES = tuple(dict.fromkeys(case.family for case in ALL))
assert len({str(case) for case in ALL}) == len(ALL), "two cases have one name"


def wrappers() -> set[str]:
    """The names of all functions of kernels/ptx/."""
    texts = [text for name, text in _sources.read().items() if name.startswith("ptx/")]
    return {name for text in texts for name in re.findall(r"^DEVICE \w+ (\w+)\(", text, re.M)}


def covered() -> set[str]:
    """The wrappers that some case is the proof of."""
    return {name for case in ALL for name in case.wrappers.split()}

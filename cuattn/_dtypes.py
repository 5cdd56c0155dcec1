"""Names of dtypes: from DLPack's codes, and from the array interface's strings."""

from __future__ import annotations

import struct

# DLPack's type codes: those with a width of their own in the name, and those without.
_SIZED = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_FIXED = {6: "bool", 16: "float6_e3m2fn", 14: "float8_e8m0fnu", 17: "float4_e2m1fn"}
_FIXED |= {7: "float8_e3m4", 8: "float8_e4m3", 9: "float8_e4m3b11fnuz", 10: "float8_e4m3fn"}
_FIXED |= {11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz", 15: "float6_e2m3fn"}
_INTERFACE_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}


def of_dlpack(name: str, element: bytes) -> str:
    """Return the name for a DLDataType, or raise TypeError naming the argument."""
    code, bits, lanes = struct.unpack("=BBH", element)
    if lanes != 1:
        raise TypeError(f"{name} has elements of {lanes} lanes; wanted one value per element")
    if code in _FIXED:
        return _FIXED[code]
    if code in _SIZED:
        return f"{_SIZED[code]}{bits}"
    raise TypeError(f"{name} has an unknown dtype (DLPack code {code}, {bits} bits)")


def of_interface(name: str, typestr: str) -> tuple[str, int]:
    """Return name and size for a `typestr` of ``__cuda_array_interface__``."""
    order, kind, size = typestr[0], typestr[1], typestr[2:]
    if order == ">":
        raise TypeError(f"{name} has dtype {typestr!r}; wanted little-endian data")
    if kind not in _INTERFACE_KINDS or not size.isdigit():
        raise TypeError(
            f"{name} has dtype {typestr!r} in __cuda_array_interface__, which cannot tell "
            "bfloat16 or float8 from raw bytes; wanted an array with __dlpack__"
        )
    itemsize = int(size)
    word = _INTERFACE_KINDS[kind]
    return (word if kind == "b" else f"{word}{8 * itemsize}"), itemsize

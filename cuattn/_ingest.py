"""Any array → `View`: pointer, shape, strides, dtype, device, producer's stream, owner.

No data is copied and no framework is imported.  A type's road is chosen once and remembered:

1. CuPy arrays: plain attributes.
2. Types with the DLPack C exchange API (PyTorch): one C call through ctypes.  It does not look at
   `requires_grad`: what comes back from us carries no gradient, as after `.detach()`.
3. `__dlpack__` capsules (JAX and others): the producer is told our stream and makes it wait.
4. `__cuda_array_interface__` (Numba and others).

Arrays on the CPU come the same ways, and NumPy's by `__array_interface__`, for the emulator only.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from . import _dtypes
from ._host import admit
from ._layout import in_elements, normalised, token_of
from ._records import HOST, View

_Road = Callable[[Any, str, "int | None", "View | None", bool], View]
_Shape = tuple[int, ...]

_ON_CUDA = {2, 13}  # kDLCUDA, kDLCUDAManaged
_ON_HOST = {1: "the CPU", 3: "the CPU (in pinned memory)"}

_WANTED = "an array on a CUDA device"
_roads: dict[type, _Road] = {}
_memo: dict[Any, Any] = {}  # what an array says of itself → (shape, strides in elements, …)
_MEMO_LIMIT = 4096
_new = tuple.__new__  # 0.15 µs; View(…) costs 0.3


def view(
    x: Any,
    name: str,
    stream: int | None = None,
    like: View | None = None,
    writable: bool = False,
) -> View:
    """Return the view of one argument, or raise TypeError naming it.

    Parameters
    ----------
    x : array
        Any object with ``__dlpack__`` or ``__cuda_array_interface__``, on a CUDA device.
    name : str
        The argument's name, for the error.
    stream : int, optional
        Handle of the stream that will read the array. Only producers of capsules are told; None
        stands for CuPy's current stream.
    like : View, optional
        A view made earlier in the call: its stream is that of other arrays of its type and device.
    writable : bool
        True for outputs: memory that its owner declares read-only is refused.
    """
    road = _roads.get(type(x)) or _choose_road(x, name)
    return road(x, name, stream, like, writable)


def query_key_value(q: Any, k: Any, v: Any, stream: int | None) -> tuple[View, View, View]:
    """Return the views of q, k and v, which mostly are arrays of one type."""
    kind = type(q)
    road = _roads.get(kind) or _choose_road(q, "q")
    q_view = road(q, "q", stream, None, False)
    if type(k) is kind and type(v) is kind:  # one look-up instead of three: 0.4 µs
        return q_view, road(k, "k", stream, q_view, False), road(v, "v", stream, q_view, False)
    return q_view, view(k, "k", stream, q_view), view(v, "v", stream, q_view)


def number(x: Any, name: str, stream: int | None = None, like: View | None = None) -> Any:
    """Return None and Python or NumPy numbers as they are, and the view of anything else."""
    if x is None or isinstance(x, Real):
        return x
    return view(x, name, stream, like)


def stream_handle(stream: Any) -> int | None:
    """Return the CUDA stream handle of a ``stream=`` argument; None stays None."""
    if stream is None:
        return None
    if type(stream) is int:
        handle = stream
    elif hasattr(stream, "__cuda_stream__"):
        handle = stream.__cuda_stream__()[1]
    elif not isinstance(stream, bool) and hasattr(stream, "__index__"):
        handle = stream.__index__()
    else:
        handle = getattr(stream, "ptr", getattr(stream, "cuda_stream", stream))
    if type(handle) is not int or handle < 0:
        raise TypeError(
            f"stream is {_a(stream)}; wanted None, a stream handle (int ≥ 0), or an object with "
            "__cuda_stream__, .ptr or .cuda_stream"
        )
    return handle


# --- choosing a road -----------------------------------------------------------------------------


def _choose_road(x: Any, name: str) -> _Road:
    kind = type(x)
    road: _Road
    if any(c.__name__ == "ndarray" and c.__module__.split(".")[0] == "cupy" for c in kind.__mro__):
        road = _from_cupy
    elif hasattr(kind, "__dlpack_c_exchange_api__") and (
        api := _exchange_functions(kind.__dlpack_c_exchange_api__)
    ):
        road = _exchange_road(*api)
    elif hasattr(x, "__array_interface__"):
        road = _from_numpy
    elif hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        road = _from_capsule
    elif hasattr(x, "__cuda_array_interface__"):
        road = _from_interface
    else:
        raise TypeError(
            f"{name} is {_a(x)}; wanted {_WANTED}, with __dlpack__ or __cuda_array_interface__"
        )
    _roads[kind] = road
    return road


def _a(x: Any) -> str:
    if x is None:
        return "None"
    kind = type(x)
    module = kind.__module__.split(".")[0]
    return f"a {kind.__name__}" if module == "builtins" else f"a {module} {kind.__name__}"


# --- 1. CuPy -------------------------------------------------------------------------------------


def _from_cupy(x: Any, name: str, stream: int | None, like: View | None, writable: bool) -> View:
    data = x.data
    device = data.device_id
    key = (x.shape, x.strides, x.dtype, device)
    try:
        shape, strides, dtype, token = _memo[key]
    except KeyError:
        shape, strides, dtype, token = _remember(key, _cupy_layout(name, *key))
    return _new(View, (data.ptr, shape, strides, dtype, device, None, False, x, token))


def _cupy_layout(
    name: str, shape: _Shape, byte_strides: _Shape, dtype: Any, device: int
) -> tuple[_Shape, _Shape, str, int]:
    strides = normalised(shape, in_elements(name, byte_strides, dtype.itemsize))
    return shape, strides, dtype.name, token_of(shape, strides, dtype.name, device)


# --- 2. the DLPack C exchange API ----------------------------------------------------------------

# DLTensor: data, (device type, device id), ndim, (code, bits, lanes), shape, strides, byte_offset.
_DLTENSOR = struct.Struct("=Q8si4sQQQ")
_read_dltensor = _DLTENSOR.unpack_from
_Chars = ctypes.POINTER(ctypes.c_char)


class _Slot(NamedTuple):
    """Memory for one DLTensor and one stream handle, and windows on what they point to.

    `shape[:n]` reads n bytes from wherever the DLTensor's shape pointer leads at that moment.
    """

    memory: bytearray
    tensor: Any  # the DLTensor's address
    cell: Any  # holds the array during the call
    shape: Any
    strides: Any
    handle: Any
    handle_address: Any


def _make_slot() -> _Slot:
    memory = bytearray(_DLTENSOR.size + 8)
    handle = ctypes.c_uint64.from_buffer(memory, _DLTENSOR.size)
    return _Slot(
        memory,
        ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))),
        ctypes.py_object(),
        _Chars.from_buffer(memory, 24),
        _Chars.from_buffer(memory, 32),
        handle,
        ctypes.c_void_p(ctypes.addressof(handle)),
    )


def _exchange_functions(capsule: Any) -> tuple[Any, Any] | None:
    """Return (fill a DLTensor, current stream) of an exchange table; None if it is none of ours."""
    try:
        table = _capsule_pointer(capsule, b"dlpack_exchange_api")
    except (ValueError, TypeError):
        return None
    while table:  # tables of older major versions hang off newer ones
        major, _, older = struct.unpack("=IIQ", ctypes.string_at(table, 16))
        if major == 1:
            break
        table = older
    if not table:
        return None
    fill, current_stream = struct.unpack("=QQ", ctypes.string_at(table + 40, 16))
    if not fill or not current_stream:
        return None
    # NOTE: no argument types: converting by type costs 0.1 µs a call for `fill`, 0.3 for the other.
    # Arguments are ctypes objects and ints of C's int size, which need none.
    function = ctypes.PYFUNCTYPE(ctypes.c_int)
    return function(fill), function(current_stream)


def _exchange_road(fill: Any, current_stream: Any) -> _Road:
    # A slot belongs to one call at a time: list.pop and append are atomic.
    slots: list[_Slot] = []
    take, give_back = slots.pop, slots.append

    def from_exchange(
        x: Any, name: str, stream: int | None, like: View | None, writable: bool
    ) -> View:
        try:
            slot = take()
        except IndexError:
            slot = _make_slot()
        memory, tensor, cell, shape_window, strides_window, handle, handle_address = slot
        cell.value = x
        try:
            if fill(cell, tensor):
                raise BufferError("its DLPack exchange function failed")
        except Exception as error:
            raise _refused(x, name, error) from error
        cell.value = False  # lets go of x; None would not (ctypes does not store it)
        pointer, place, ndim, element, _, has_strides, offset = _read_dltensor(memory)
        ndim *= 8
        key = (
            place,
            element,
            shape_window[:ndim],
            strides_window[:ndim] if has_strides else None,
        )
        try:
            shape, strides, dtype, device, kind, token = _memo[key]
        except KeyError:
            layout = _exchange_layout(x, name, *key)
            shape, strides, dtype, device, kind, token = layout
            if device == HOST:  # not remembered: whether it is admitted may change
                give_back(slot)
                return View(pointer + offset, shape, strides, dtype, HOST, None, False, x, token)
            _remember(key, layout)
        if like is not None and like.device == device and type(like.owner) is type(x):
            producer = like.stream
        else:
            current_stream(kind, device, handle_address)
            producer = handle.value
        give_back(slot)
        place = pointer + offset
        return _new(View, (place, shape, strides, dtype, device, producer, False, x, token))

    return from_exchange


def _exchange_layout(
    x: Any, name: str, place: bytes, element: bytes, shape: bytes, strides: bytes | None
) -> tuple[_Shape, _Shape, str, int, int, int]:
    kind, device = struct.unpack("=ii", place)
    device = _ordinal(x, name, kind, device)
    count = len(shape) // 8
    dims = struct.unpack(f"={count}q", shape)
    steps = None if strides is None else struct.unpack(f"={count}q", strides)
    steps, dtype = normalised(dims, steps), _dtypes.of_dlpack(name, element)
    return dims, steps, dtype, device, kind, token_of(dims, steps, dtype, device)


# --- 3. DLPack capsules --------------------------------------------------------------------------

_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_READ_ONLY, _COPIED = 1, 2  # bits of DLManagedTensorVersioned.flags


def _from_capsule(x: Any, name: str, stream: int | None, like: View | None, writable: bool) -> View:
    kind, device = (int(part) for part in x.__dlpack_device__())
    device = _ordinal(x, name, kind, device)
    if device == HOST:
        capsule = _ask_capsule(x, name, None)
    else:
        if stream is None:
            stream = _cupy_stream()
        capsule = _ask_capsule(x, name, stream or 1)  # DLPack writes the null stream as 1
    table = _capsule_name(capsule)
    if table == b"dltensor_versioned":
        base = _capsule_pointer(capsule, table)
        major, _, _, _, flags = struct.unpack("=IIQQQ", ctypes.string_at(base, 32))
        if major > 1:
            raise TypeError(f"{name} came as DLPack {major}.x ({_a(x)}); wanted version 0 or 1")
        base += 32
        fixed = flags & (_READ_ONLY | _COPIED)
    elif table == b"dltensor":
        base = _capsule_pointer(capsule, table)
        fixed = type(x).__module__.split(".")[0] in ("jax", "jaxlib")  # no flags in version 0
    else:
        raise TypeError(f"{name} gave a capsule named {table!r}; wanted a DLPack capsule")
    if writable and fixed:
        raise TypeError(f"{name} is read-only ({_a(x)}); wanted an array that can be written")
    pointer, _, ndim, element, dims, steps, offset = _read_dltensor(ctypes.string_at(base, 48))
    layout = struct.Struct(f"={ndim}q")
    shape = layout.unpack(ctypes.string_at(dims, layout.size))
    strides = layout.unpack(ctypes.string_at(steps, layout.size)) if steps else None
    # An unconsumed capsule calls the producer's deleter when it goes: it is the owner.
    return _viewed(
        pointer + offset,
        shape,
        strides,
        _dtypes.of_dlpack(name, element),
        device,
        None,
        True,
        capsule,
    )


def _ask_capsule(x: Any, name: str, stream: int | None) -> Any:
    try:
        try:
            return x.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:  # made before DLPack 1.0
            return x.__dlpack__(stream=stream)
    except Exception as error:
        raise _refused(x, name, error) from error


def _cupy_stream() -> int:
    import cupy

    return cupy.cuda.get_current_stream().ptr


# --- 4. __cuda_array_interface__ -----------------------------------------------------------------


def _from_interface(
    x: Any, name: str, stream: int | None, like: View | None, writable: bool
) -> View:
    said = x.__cuda_array_interface__
    pointer, read_only = said["data"]
    if writable and read_only:
        raise TypeError(f"{name} is read-only ({_a(x)}); wanted an array that can be written")
    if said.get("mask") is not None:
        raise TypeError(f"{name} is a masked array ({_a(x)}); wanted one without a mask")
    dtype, itemsize = _dtypes.of_interface(name, said["typestr"])
    shape = tuple(said["shape"])
    steps = said.get("strides")
    strides = None if steps is None else in_elements(name, tuple(steps), itemsize)
    producer = said.get("stream")
    return _viewed(
        pointer or 0,
        shape,
        strides,
        dtype,
        _pointer_device(pointer, name, x),
        0 if producer == 1 else producer,  # the interface writes the null stream as 1
        True,
        x,
    )


def _pointer_device(pointer: int, name: str, x: Any) -> int:
    """Return the ordinal of the device that holds `pointer`: the interface does not say."""
    from cupy.cuda import runtime

    if not pointer:  # zero-size array
        return runtime.getDevice()
    attributes = runtime.pointerGetAttributes(pointer)
    if attributes.type not in (2, 3):  # cudaMemoryTypeDevice, cudaMemoryTypeManaged
        raise TypeError(f"{name} is on the CPU ({_a(x)}); wanted {_WANTED}")
    return attributes.device


# --- 5. NumPy, for the emulator ------------------------------------------------------------------


def _from_numpy(x: Any, name: str, stream: int | None, like: View | None, writable: bool) -> View:
    admit(name, _a(x), "the CPU", _WANTED)
    pointer, read_only = x.__array_interface__["data"]
    if writable and read_only:
        raise TypeError(f"{name} is read-only ({_a(x)}); wanted an array that can be written")
    strides = in_elements(name, x.strides, x.dtype.itemsize)
    dtype = x.dtype.name if x.dtype.isnative else x.dtype.str
    return _viewed(pointer, x.shape, strides, dtype, HOST, None, False, x)


# --- common to all roads -------------------------------------------------------------------------


def _viewed(
    pointer: int,
    shape: _Shape,
    strides: _Shape | None,
    dtype: str,
    device: int,
    stream: int | None,
    guarded: bool,
    owner: Any,
) -> View:
    """Return the view of an array whose layout is not remembered."""
    strides = normalised(shape, strides)
    token = token_of(shape, strides, dtype, device)
    return View(pointer, shape, strides, dtype, device, stream, guarded, owner, token)


def _remember(key: Any, value: Any) -> Any:
    if len(_memo) >= _MEMO_LIMIT:  # token counts vary without end in a server
        _memo.clear()
    _memo[key] = value
    return value


def _ordinal(x: Any, name: str, kind: int, device: int) -> int:
    """Return the ordinal for DLPack's (kind, device), or raise TypeError naming the argument."""
    if kind in _ON_CUDA:
        return device
    if kind not in _ON_HOST:
        raise TypeError(f"{name} is on a device of DLPack type {kind} ({_a(x)}); wanted {_WANTED}")
    admit(name, _a(x), _ON_HOST[kind], _WANTED)
    return HOST


def _refused(x: Any, name: str, error: Exception) -> TypeError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TypeError(f"{name} ({_a(x)}) cannot be exported: {reason}; wanted {_WANTED}")

"""append_kv: every bit of every token in its place, and not a bit anywhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from append_cases import AppendCall, AppendCase, Array
from cases import DTYPES
from compare import bits

import cuattn
from cuattn import _tool_params, _validate, emulator


@dataclass(frozen=True)
class Case(AppendCase):
    """One call of append_kv."""

    heads: int = 2
    d_k: int = 64
    d_v: int = 64
    layout: str = "HND"
    pair: bool = False

    def words(self) -> dict[str, bool]:
        return {
            **super().words(),
            f"d{self.d_k}v{self.d_v}": (self.d_k, self.d_v) != (64, 64),
            f"{self.heads}heads": self.heads != 2,
            self.layout: True,
            "pair": self.pair,
        }


class Call(AppendCall):
    """A call of append_kv, and what it must leave."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.case = case
        shape: tuple[int, ...] = (int(self.ends[-1]) + case.extra, case.heads)
        if case.uniform and case.lengths[0][1] > 1:
            shape = (len(self.seq_lens), case.lengths[0][1], case.heads)
        self.new = [self.random((*shape, d)) for d in (case.d_k, case.d_v)]
        self.caches = [self.random(self.cache_shape(d)) for d in (case.d_k, case.d_v)]
        if not case.pair:
            self.caches = [self.random((self.pages, 2, *self.cache_shape(case.d_k)[1:]))]

    def cache_shape(self, dim: int) -> tuple[int, ...]:
        inner = (self.case.heads, self.case.page_size)
        return (self.pages, *(inner if self.case.layout == "HND" else inner[::-1]), dim)

    def expected(self) -> list[Array]:
        """The arrays that hold the cache, afterwards."""
        case = self.case
        wholes = [whole.copy() for whole in self.caches]
        parts = [self.cut(whole) for whole in wholes]
        if not case.pair:
            parts = [parts[0][:, 0], parts[0][:, 1]]
        if case.layout == "NHD":
            parts = [part.transpose(0, 2, 1, 3) for part in parts]
        for part, new in zip(parts, self.new, strict=True):
            rows = self.cut(new)
            rows = rows.reshape(-1, *rows.shape[-2:])
            for token, page, row in self.places():
                part[page, :, row] = rows[token]
        return wholes

    def run(self, device: Any, **more: Any) -> list[Array]:
        """Run the call; return the arrays that hold the cache."""
        wholes = [device.to_device(whole) for whole in self.caches]
        caches = tuple(self.cut(whole) for whole in wholes)
        new = [self.cut(device.to_device(whole)) for whole in self.new]
        ends = None if self.case.uniform else device.to_device(self.ends)
        returned = cuattn.append_kv(
            caches if self.case.pair else caches[0],
            *new,
            device.to_device(self.tables),
            device.to_device(self.seq_lens),
            ends,
            layout=self.case.layout,
            **more,
        )
        assert returned is None
        return [device.to_host(whole) for whole in wholes]

    def check(self, device: Any, **more: Any) -> None:
        for seen, wanted in zip(self.run(device, **more), self.expected(), strict=True):
            np.testing.assert_array_equal(bits(seen), bits(wanted), str(self.case))


USUAL = Case()
ONE_EACH = tuple((length, 1) for length in (1, 17, 40, 16))
CASES = [
    *(replace(USUAL, page_size=size) for size in (8, 16, 32, 64, 128, 256)),
    *(replace(USUAL, page_size=size, layout="NHD") for size in (8, 64)),
    replace(USUAL, pair=True),
    replace(USUAL, pair=True, d_k=192, d_v=128, layout="NHD"),
    replace(USUAL, pair=True, d_k=8, d_v=40, heads=3),
    replace(USUAL, padded=False),
    replace(USUAL, padded=False, layout="NHD"),
    replace(USUAL, dtype="float16", heads=1, d_k=128, d_v=128),
    replace(USUAL, heads=8, d_k=128, d_v=128),
    replace(USUAL, heads=5, d_k=576, d_v=576),  # three warps for a token's K
    replace(USUAL, extra=9),
    replace(USUAL, lengths=ONE_EACH, uniform=True),
    replace(USUAL, lengths=ONE_EACH, uniform=True, padded=False, layout="NHD"),
    replace(USUAL, lengths=((5, 3), (3, 3), (30, 3)), uniform=True),
    replace(USUAL, lengths=tuple((n % 11 + 2, n % 3) for n in range(150)), d_k=8, d_v=8),
    replace(USUAL, lengths=tuple((3, int(n in (0, 700, 1099))) for n in range(1100)), d_k=8, d_v=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_in_its_place(device: Any, case: Case) -> None:
    Call(case).check(device)


def changed(**arrays: Any) -> Call:
    """The usual call with other contents of its index arrays."""
    call = Call(USUAL)
    for name, array in arrays.items():
        setattr(call, name, np.asarray(array, np.int32))
    return call


@pytest.mark.parametrize(
    "seq_lens",
    [
        (3, 16, 0, 9, 40, 23),  # two tokens before the beginning
        (37, 16, 0, 9, 40, 4 * 16 + 3),  # tokens past the table's end
        (-5, -(2**31), 0, -1, 7, 2**31 - 1),
    ],
)
def test_tokens_out_of_the_table_are_dropped(device: Any, seq_lens: tuple[int, ...]) -> None:
    changed(seq_lens=seq_lens).check(device)


@pytest.mark.parametrize("page", [-1, -(2**31), 2**31 - 1, "pages"])
def test_tokens_of_no_page_are_dropped(device: Any, page: Any) -> None:
    call = Call(USUAL)
    call.tables[:, 1:] = call.pages if page == "pages" else page
    call.check(device)


@pytest.mark.parametrize(
    "ends", [(0, 5, 21, 21, 22, 22, 99), (3, 5, 21, 21, 22, 22, 29), (29, 0, 0, 0, 0, 0, 0)]
)
def test_prefix_sums_that_lie_write_nothing_out_of_bounds(device: Any, ends: Any) -> None:
    """Neither in the emulator, which looks at every access, nor outside of the pages."""
    call = changed(ends=ends)
    for seen, before in zip(call.run(device), call.caches, strict=True):
        wanted = bits(before).copy()
        call.cut(wanted)[...] = call.cut(bits(seen))
        np.testing.assert_array_equal(bits(seen), wanted)


def test_pages_may_be_shared(device: Any) -> None:
    """Two requests with one prefix, each with a last page of its own."""
    call = Call(Case(lengths=((33, 1), (34, 2))))
    call.tables[1, :2] = call.tables[0, :2]
    call.check(device)


def test_no_tokens(device: Any) -> None:
    Call(Case(lengths=((20, 0), (3, 0)))).check(device)


@pytest.mark.parametrize("tokens", [0, 7])
def test_no_requests(device: Any, tokens: int) -> None:
    call = Call(Case(lengths=((20, 0),), extra=tokens))
    call.tables, call.seq_lens, call.ends = call.tables[:0], call.seq_lens[:0], call.ends[:1]
    call.check(device)


# Every branch of the kernel between them.
RACES = [
    *(Call(CASES[number]) for number in (0, 10, 14, 16, 19, 20)),
    changed(seq_lens=(3, 16, 0, 9, 40, 23)),
    changed(ends=(3, 5, 21, 21, 22, 22, 29)),
]


def run_races(**options: Any) -> None:
    from conftest import Emulated

    for call in RACES:
        with emulator.enabled(**options) as launches:
            call.check(Emulated())
        assert len(launches) == 1


@pytest.mark.emulator
@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_in_race_mode(schedule: Any) -> None:
    run_races(race=True, schedule=schedule)


def test_the_grid_is_small_for_few_tokens() -> None:
    from cuattn import append
    from cuattn._records import View

    def grid(tokens: int, batch: int) -> int:
        shapes = [(99, 8, 64, 128), (99, 8, 64, 128), (tokens, 8, 128), (tokens, 8, 128)]
        views = [
            View(0, shape, append_strides(shape), "bfloat16", 0, None, False, None, 0)
            for shape in shapes
        ]
        for shape in ((batch, 5), (batch,), (batch + 1,)):
            views.append(View(0, shape, append_strides(shape), "int32", 0, None, False, None, 0))
        return append._plan(tuple(views), "HND").step.grid

    warps = _tool_params.AppendConfig().warps
    assert grid(1, 1) == 1
    assert grid(64, 64) == 64 * 2 // warps
    assert grid(8192, 3) == 8192 * 2 // warps


def append_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


# --- errors --------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float16) -> Array:
    return np.zeros(shape, dtype)


def index(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


GOOD: dict[str, Any] = {
    "kv_cache": zeros(6, 2, 3, 16, 64),
    "k_new": zeros(5, 3, 64),
    "v_new": zeros(5, 3, 64),
    "block_tables": index(2, 4),
    "seq_lens": index(2),
    "cu_seqlens_new": index(3),
    "layout": "HND",
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"k_new": zeros(5, 3, 64, dtype=np.float32)}, "k_new is float32; wanted bfloat16 or float16"),
    ({"v_new": zeros(5, 3, 64, dtype=DTYPES["bfloat16"])}, "v_new is bfloat16; wanted k_new's"),
    ({"kv_cache": zeros(6, 2, 3, 16, 64, dtype=np.float32)}, r"\(k\) is float32; wanted k_new's"),
    ({"kv_cache": zeros(6, 3, 3, 16, 64)}, r"wanted 5 axes \[pages, 2, …\]"),
    ({"kv_cache": (zeros(6, 3, 16, 64), zeros(6, 3, 32, 64))}, r"\(v\) has 32 tokens a page"),
    ({"kv_cache": (zeros(6, 3, 16, 64), zeros(7, 3, 16, 64))}, r"\(v\) has 7 pages"),
    ({"kv_cache": (zeros(6, 3, 16, 64),)}, "wanted a pair"),
    ({"kv_cache": zeros(6, 2, 3, 24, 64)}, "page size 24; wanted a power of two ≥ 8"),
    ({"kv_cache": zeros(6, 2, 3, 16, 68)[..., :64]}, r"kv_cache \(k\) has stride 68"),
    ({"layout": "NHD"}, "page size 3|k_new has 3 heads; wanted"),
    ({"layout": "XYZ"}, "layout is 'XYZ'; wanted 'HND' or 'NHD'"),
    ({"layout": ["HND"]}, r"layout is \['HND'\]; wanted"),
    ({"k_new": zeros(5, 192)}, r"k_new has shape \(5, 192\); wanted 3 axes"),
    ({"k_new": zeros(5, 4, 64), "v_new": zeros(5, 4, 64)}, "k_new has 4 heads; wanted kv_cache"),
    ({"k_new": zeros(5, 3, 72)}, r"k_new has head_dim 72; wanted kv_cache \(k\)'s 64"),
    ({"v_new": zeros(5, 3, 60)}, "v_new has head_dim 60; wanted a multiple of 8"),
    ({"v_new": zeros(4, 3, 64)}, r"v_new has shape \(4, 3, 64\); wanted k_new's \(5, 3, 64\)"),
    ({"k_new": zeros(5, 3, 68)[..., :64]}, "k_new has stride 204"),
    ({"block_tables": index(8)}, r"block_tables has shape \(8,\); wanted int32"),
    ({"block_tables": np.zeros((2, 4))}, "block_tables is float64; wanted int32"),
    ({"seq_lens": index(3)}, r"seq_lens has shape \(3,\); wanted \[2\]"),
    ({"cu_seqlens_new": index(2)}, "cu_seqlens_new has 2 elements; wanted 3"),
    ({"cu_seqlens_new": None}, "k_new has batch 5; wanted 2"),
    ({"seq_lens": None}, "seq_lens is None; wanted"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_errors_are_one_sentence(device: Any, change: dict[str, Any], sentence: str) -> None:
    given = {name: to(device, value) for name, value in (GOOD | change).items()}
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        cuattn.append_kv(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.emulator
@pytest.mark.parametrize(("writable", "sentence"), [(True, "share memory"), (False, "read-only")])
def test_a_cache_that_cannot_be_written_is_refused(writable: bool, sentence: str) -> None:
    cache = np.lib.stride_tricks.as_strided(
        zeros(3, 16, 64), (6, 2, 3, 16, 64), (0, 0, 2048, 128, 2), writeable=writable
    )
    with emulator.enabled(), pytest.raises((TypeError, ValueError), match=sentence):
        cuattn.append_kv(**GOOD | {"kv_cache": cache})


def to(device: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to(device, part) for part in value)
    return device.to_device(value) if isinstance(value, np.ndarray) else value


def test_new_tokens_may_not_lie_in_the_cache(device: Any) -> None:
    cache = to(device, zeros(6, 2, 3, 16, 64))
    given = {name: to(device, value) for name, value in GOOD.items()}
    new = {"k_new": cache[:5, 0, :, 0], "v_new": cache[:5, 1, :, 0]}
    with pytest.raises(ValueError, match="kv_cache shares memory with k_new"):
        cuattn.append_kv(**given | {"kv_cache": cache} | new)
    with pytest.raises(ValueError, match=r"kv_cache \(v\) shares memory with kv_cache \(k\)"):
        cuattn.append_kv(**given | {"kv_cache": (cache[:, 0], cache[:, 0])})


@pytest.mark.parametrize("arrays", [1, 2])
def test_only_near_arrays_are_looked_at_closely(arrays: int) -> None:
    """`_near` is never wrong about arrays that touch, and right about those far apart."""
    from cuattn import append

    def near(*pointers: int) -> bool:
        return append._near(tuple((at,) for at in pointers), [100, 100, 10, 10], arrays)  # type: ignore

    assert not near(0, 1000, 100, 990)
    assert near(0, 1000, 99, 500)
    assert near(0, 1000, 500, 991)
    assert near(0, 1000, 500, 1099)
    assert near(0, 99, 500, 600) is (arrays == 2)


def test_a_checked_call_names_the_offender(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "checking", True)
    Call(USUAL).check(device)
    call = Call(USUAL)
    call.tables[3, 0] = 4711
    with pytest.raises(ValueError, match=rf"block_tables\[3, 0\] is 4711.*0 to {call.pages - 1}"):
        call.run(device)
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 3, below the request's 5 new tokens"):
        changed(seq_lens=(3, 16, 0, 9, 40, 23)).run(device)


# --- on a GPU ------------------------------------------------------------------------------------


def test_eight_thousand_tokens(gpu: Any) -> None:
    Call(Case(lengths=((5000, 4096), (4100, 4096)), heads=8, d_k=128, d_v=128)).check(gpu)


def test_a_captured_call_replays_with_other_lengths(gpu: Any) -> None:
    import cupy

    call = Call(USUAL)
    wholes = [gpu.to_device(whole) for whole in call.caches]
    new = [call.cut(gpu.to_device(whole)) for whole in call.new]
    tables, lengths, ends = map(gpu.to_device, (call.tables, call.seq_lens, call.ends))
    stream = cupy.cuda.Stream(non_blocking=True)

    def run() -> None:
        cuattn.append_kv(call.cut(wholes[0]), *new, tables, lengths, ends)

    with stream:
        lengths.fill(0)  # nothing has a place yet
        run()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        for seq_lens in ((37, 16, 0, 9, 40, 23), (20, 16, 0, 2, 40, 9)):
            lengths.set(np.array(seq_lens, np.int32))
            graph.launch()
            stream.synchronize()
            call.seq_lens = np.array(seq_lens, np.int32)
            call.caches = call.expected()
            seen = gpu.to_host(wholes[0])
            np.testing.assert_array_equal(bits(seen), bits(call.caches[0]))

"""append_mla_kv: latent and rope part of every token in one row, and not a bit anywhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from append_cases import AppendCall, AppendCase, Array
from cases import DTYPES
from compare import bits

import cuattn
from cuattn import _validate, emulator

HEAD_AXES = {"none": (), "before": (1,), "behind": (2,)}  # of a cache, by page_size's place


@dataclass(frozen=True)
class Case(AppendCase):
    """One call of append_mla_kv."""

    latent: int = 512
    rope: int = 64
    head: str = "none"  # where the cache has its head axis
    unit: tuple[bool, bool] = (False, False)  # whether latent and rope rows have one

    def words(self) -> dict[str, bool]:
        return {
            **super().words(),
            f"{self.latent}+{self.rope}": (self.latent, self.rope) != (512, 64),
            f"head-{self.head}": self.head != "none",
            "unit-latent": self.unit[0],
            "unit-rope": self.unit[1],
        }


class Call(AppendCall):
    """A call of append_mla_kv, and what it must leave."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.case = case
        self.new = [
            self.random(self.new_shape(dim, unit))
            for dim, unit in zip((case.latent, case.rope), case.unit, strict=True)
        ]
        shape = [self.pages, case.page_size, case.latent + case.rope]
        for axis in HEAD_AXES[case.head]:
            shape.insert(axis, 1)
        self.cache = self.random(tuple(shape))

    def new_shape(self, dim: int, unit: bool) -> tuple[int, ...]:
        each = self.case.lengths[0][1]
        if self.case.uniform and each > 1:
            return (len(self.seq_lens), each, dim)
        tokens = int(self.ends[-1]) + self.case.extra
        return (tokens, 1, dim) if unit else (tokens, dim)

    def expected(self) -> Array:
        """The array that holds the cache, afterwards."""
        case = self.case
        whole = self.cache.copy()
        rows = np.squeeze(self.cut(whole), HEAD_AXES[case.head])
        latent, rope = (
            self.cut(new).reshape(-1, dim)
            for new, dim in zip(self.new, (case.latent, max(case.rope, 1)), strict=True)
        )
        for token, page, row in self.places():
            rows[page, row, : case.latent] = latent[token]
            if case.rope:
                rows[page, row, case.latent :] = rope[token]
        return whole

    def run(self, device: Any, **more: Any) -> Array:
        """Run the call; return the array that holds the cache."""
        whole = device.to_device(self.cache)
        c_kv, k_pe = (self.cut(device.to_device(new)) for new in self.new)
        returned = cuattn.append_mla_kv(
            self.cut(whole),
            c_kv,
            k_pe if self.case.rope else None,
            device.to_device(self.tables),
            device.to_device(self.seq_lens),
            None if self.case.uniform else device.to_device(self.ends),
            **more,
        )
        assert returned is None
        seen: Array = device.to_host(whole)
        return seen

    def check(self, device: Any, **more: Any) -> None:
        seen, wanted = self.run(device, **more), self.expected()
        np.testing.assert_array_equal(bits(seen), bits(wanted), str(self.case))


USUAL = Case()
ONE_EACH = tuple((length, 1) for length in (1, 17, 40, 16))
THREE_EACH = ((5, 3), (3, 3), (30, 3))
CASES = [
    *(replace(USUAL, page_size=size) for size in (8, 16, 32, 64, 128)),
    replace(USUAL, page_size=64, padded=False),
    replace(USUAL, dtype="float16"),
    *(replace(USUAL, head=head, page_size=64) for head in ("before", "behind")),
    *(replace(USUAL, head=head, padded=False) for head in ("before", "behind")),
    *(replace(USUAL, unit=unit) for unit in ((True, True), (False, True), (True, False))),
    replace(USUAL, rope=0),
    replace(USUAL, rope=0, padded=False, head="behind"),
    *(replace(USUAL, latent=n, rope=m) for n, m in ((8, 8), (256, 32), (64, 512), (1536, 40))),
    replace(USUAL, extra=9),
    replace(USUAL, lengths=ONE_EACH, uniform=True),
    replace(USUAL, lengths=ONE_EACH, uniform=True, unit=(False, True), padded=False),
    replace(USUAL, lengths=ONE_EACH, uniform=True, rope=0),
    replace(USUAL, lengths=THREE_EACH, uniform=True),
    replace(USUAL, lengths=THREE_EACH, uniform=True, padded=False, head="before"),
    replace(USUAL, lengths=tuple((n % 11 + 2, n % 3) for n in range(150)), latent=16, rope=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_in_its_place(device: Any, case: Case) -> None:
    Call(case).check(device)


def test_the_same_as_two_caches_of_one_head(device: Any) -> None:
    """What `append_kv` makes of the two parts of each row."""
    call = Call(replace(USUAL, padded=False))
    whole = device.to_device(call.cache)
    index = [device.to_device(x) for x in (call.tables, call.seq_lens, call.ends)]
    parts = (whole[:, None, :, :512], whole[:, None, :, 512:])
    cuattn.append_kv(parts, *(device.to_device(new)[:, None] for new in call.new), *index)
    np.testing.assert_array_equal(bits(device.to_host(whole)), bits(call.run(device)))


def changed(case: Case = USUAL, **arrays: Any) -> Call:
    """The usual call with other contents of its index arrays."""
    call = Call(case)
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
@pytest.mark.parametrize("rope", [64, 0])
def test_tokens_of_no_page_are_dropped(device: Any, page: Any, rope: int) -> None:
    call = Call(replace(USUAL, rope=rope))
    call.tables[:, 1:] = call.pages if page == "pages" else page
    call.check(device)


@pytest.mark.parametrize("ends", [(0, 5, 21, 21, 22, 22, 99), (29, 0, 0, 0, 0, 0, 0)])
def test_prefix_sums_that_lie_write_nothing_out_of_bounds(device: Any, ends: Any) -> None:
    call = changed(ends=ends)
    wanted = bits(call.cache).copy()
    seen = bits(call.run(device))
    call.cut(wanted)[...] = call.cut(seen)
    np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize("rope", [64, 0])
def test_no_tokens(device: Any, rope: int) -> None:
    Call(Case(lengths=((20, 0), (3, 0)), rope=rope)).check(device)


@pytest.mark.parametrize("tokens", [0, 7])
def test_no_requests(device: Any, tokens: int) -> None:
    call = Call(Case(lengths=((20, 0),), extra=tokens))
    call.tables, call.seq_lens, call.ends = call.tables[:0], call.seq_lens[:0], call.ends[:1]
    call.check(device)


@pytest.mark.emulator
@pytest.mark.parametrize("schedule", ["forward", "reverse", 5])
def test_in_race_mode(schedule: Any) -> None:
    from conftest import Emulated

    small = replace(USUAL, latent=32, rope=16)
    calls = [
        Call(small),
        Call(replace(small, rope=0)),
        Call(replace(USUAL, latent=1536, rope=8, lengths=THREE_EACH, uniform=True)),
        changed(small, seq_lens=(3, 16, 0, 9, 40, 23)),
    ]
    for call in calls:
        with emulator.enabled(race=True, schedule=schedule) as launches:
            call.check(Emulated())
        assert len(launches) == 1


# --- errors --------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float16) -> Array:
    return np.zeros(shape, dtype)


def index(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


GOOD: dict[str, Any] = {
    "kv_cache": zeros(6, 16, 576),
    "c_kv_new": zeros(5, 512),
    "k_pe_new": zeros(5, 64),
    "block_tables": index(2, 4),
    "seq_lens": index(2),
    "cu_seqlens_new": index(3),
}
BFLOAT16 = DTYPES["bfloat16"]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"c_kv_new": zeros(5, 512, dtype=np.float32)}, "c_kv_new is float32; wanted bfloat16 or"),
    ({"k_pe_new": zeros(5, 64, dtype=BFLOAT16)}, "k_pe_new is bfloat16; wanted c_kv_new's float16"),
    ({"kv_cache": zeros(6, 16, 576, dtype=BFLOAT16)}, "kv_cache is bfloat16; wanted c_kv_new's"),
    ({"kv_cache": zeros(6, 2, 16, 576)}, r"kv_cache has shape \(6, 2, 16, 576\); wanted \[pages, "),
    ({"kv_cache": zeros(96, 576)}, "kv_cache has shape .*, or that with a head axis of 1"),
    ({"kv_cache": (zeros(6, 16, 512), zeros(6, 16, 64))}, "kv_cache is a tuple; wanted an array"),
    ({"kv_cache": zeros(6, 24, 576)}, "page size 24; wanted a power of two ≥ 8"),
    ({"kv_cache": zeros(6, 1, 1, 576)}, "page size 1; wanted a power of two ≥ 8"),
    ({"kv_cache": zeros(6, 16, 580)[..., :576]}, "kv_cache has stride 580"),
    ({"kv_cache": zeros(6, 16, 640)}, "rows of 640; wanted 576, for c_kv_new's 512 and k_pe_new's"),
    ({"k_pe_new": None}, "rows of 576; wanted 512, for c_kv_new's 512 and no k_pe_new"),
    ({"c_kv_new": zeros(5, 516)}, "c_kv_new has rows of 516; wanted a multiple of 8"),
    ({"c_kv_new": zeros(5, 0)}, "c_kv_new has rows of 0; wanted a multiple of 8"),
    ({"k_pe_new": zeros(5, 0)}, "k_pe_new has rows of 0; wanted a multiple of 8"),
    ({"c_kv_new": zeros(512)}, r"c_kv_new has shape \(512,\); wanted \[tokens, dim\] or \[tokens,"),
    ({"c_kv_new": zeros(5, 2, 512)}, r"\(5, 2, 512\); wanted \[tokens, dim\] or \[tokens, 1, dim"),
    ({"k_pe_new": zeros(4, 64)}, r"\(4, 64\); wanted as many tokens as c_kv_new, \(5, 512\)"),
    ({"k_pe_new": zeros(5, 68)[:, :64]}, "k_pe_new has stride 68"),
    ({"c_kv_new": zeros(5, 1024)[:, ::2]}, "c_kv_new has stride 2 on its last axis; wanted 1"),
    ({"block_tables": index(8)}, r"block_tables has shape \(8,\); wanted int32"),
    ({"seq_lens": index(3)}, r"seq_lens has shape \(3,\); wanted \[2\]"),
    ({"cu_seqlens_new": index(2)}, "cu_seqlens_new has 2 elements; wanted 3"),
    ({"cu_seqlens_new": None}, "c_kv_new has batch 5; wanted 2"),
    (
        {"cu_seqlens_new": None, "c_kv_new": zeros(2, 3, 1, 512)},
        r"c_kv_new has shape .*; wanted \[batch, dim\] or \[batch, tokens, dim\]",
    ),
    ({"c_kv_new": None}, "c_kv_new is None; wanted"),
]


def to(device: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to(device, part) for part in value)
    return device.to_device(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_errors_are_one_sentence(device: Any, change: dict[str, Any], sentence: str) -> None:
    given = {name: to(device, value) for name, value in (GOOD | change).items()}
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        cuattn.append_mla_kv(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("strides", "writable", "sentence"),
    [
        ((0, 1152, 2), True, "share memory"),
        ((16 * 1024, 1024, 2), True, "share memory"),  # a row's rope part lies in the next row
        ((16 * 1152, 1152, 2), False, "read-only"),
    ],
)
def test_a_cache_that_cannot_be_written_is_refused(
    strides: tuple[int, ...], writable: bool, sentence: str
) -> None:
    cache = np.lib.stride_tricks.as_strided(
        zeros(6, 16, 576), (6, 16, 576), strides, writeable=writable
    )
    with emulator.enabled(), pytest.raises((TypeError, ValueError), match=sentence):
        cuattn.append_mla_kv(**GOOD | {"kv_cache": cache})


@pytest.mark.parametrize("name", ["c_kv_new", "k_pe_new"])
def test_new_tokens_may_not_lie_in_the_cache(device: Any, name: str) -> None:
    given = {key: to(device, value) for key, value in GOOD.items()}
    given[name] = given["kv_cache"][:5, 3, : GOOD[name].shape[1]]
    with pytest.raises(ValueError, match=f"kv_cache shares memory with {name}"):
        cuattn.append_mla_kv(**given)


def test_a_checked_call_names_the_offender(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "checking", True)
    Call(USUAL).check(device)
    call = Call(USUAL)
    call.tables[3, 0] = 4711
    with pytest.raises(ValueError, match=rf"block_tables\[3, 0\] is 4711.*0 to {call.pages - 1}"):
        call.run(device)
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 3, below the request's 5 new tokens"):
        changed(seq_lens=(3, 16, 0, 9, 40, 23)).run(device)
    with pytest.raises(ValueError, match=r"\[6\] is 99; wanted at most c_kv_new's 29 tokens"):
        changed(ends=(0, 5, 21, 21, 22, 22, 99)).run(device)
    uniform = replace(USUAL, lengths=THREE_EACH, uniform=True)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] is 2, below the request's 3 new tokens"):
        changed(uniform, seq_lens=(5, 2, 30)).run(device)


# --- on a GPU ------------------------------------------------------------------------------------


def test_eight_thousand_tokens(gpu: Any) -> None:
    Call(Case(lengths=((5000, 4096), (4100, 4096)), page_size=64)).check(gpu)


def test_on_a_stream_of_the_caller(gpu: Any) -> None:
    import cupy

    Call(USUAL).check(gpu, stream=cupy.cuda.Stream(non_blocking=True))


def test_a_captured_call_replays_with_other_lengths(gpu: Any) -> None:
    import cupy

    call = Call(USUAL)
    whole = gpu.to_device(call.cache)
    new = [call.cut(gpu.to_device(part)) for part in call.new]
    tables, lengths, ends = map(gpu.to_device, (call.tables, call.seq_lens, call.ends))
    stream = cupy.cuda.Stream(non_blocking=True)

    def run() -> None:
        cuattn.append_mla_kv(call.cut(whole), *new, tables, lengths, ends)

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
            call.cache = call.expected()
            np.testing.assert_array_equal(bits(gpu.to_host(whole)), bits(call.cache))

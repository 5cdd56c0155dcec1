"""C++ and Python twins: the same fields, the same offsets, the same defaults; none needs a GPU.

NVRTC itself is asked: a `static_assert` per field is compiled with the headers of the kernels.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from cases import (
    BATCHED,
    PAGED_CASES,
    RAGGED_CASES,
    SKIP_CASES,
    SKIP_PAGED,
    SKIP_RAGGED,
    batched,
    paged,
    problem_of,
    ragged,
)
from decode_cases import DECODE, SKIP_DECODE, DecodeCase, decode_call, problem_of_decode

from cuattn import _compile, _heuristics, _params, _shipped, _sources, _tensor_map, emulator
from cuattn._config import (
    DecodeConfig,
    FmhaConfig,
    FmhaHopperConfig,
    MergeSplitsConfig,
    MlaConfig,
    MlaPortableConfig,
)
from cuattn._records import (
    DecodeGeometry,
    Device,
    Geometry,
    Layout,
    Plan,
    Problem,
    SkipMode,
    SplitRule,
)

H200 = Device(0, "NVIDIA H200", (9, 0), "sm_90a", 132, 232448)
OFFSET = "__INTADDR__(&((AttentionParams*)0)->{})"  # NVRTC has no offsetof
CONFIGURATIONS = 60  # compiled once each; about a second apiece
DECODE_CONFIGURATIONS = 40


def offsets() -> dict[str, tuple[int, str]]:
    """Where each field lies in the launch parameters, and its `struct` code, as Python packs it."""
    widths = {"Q": 8, "3q": 24, "2q": 16, "q": 8, "i": 4, "f": 4}
    codes = [
        *((name, "Q") for name in _params.POINTERS),
        *((name, "3q") for name in _params.STRIDES),
        ("block_table_stride", "q"),
        ("threshold_strides", "2q"),
        *((name, "i") for name in _params.INTEGERS),
        ("splits.share", "f"),
        ("splits.smallest", "i"),
        ("splits.alone", "i"),
        *((name, "i") for name in _params.MORE),
        *((name, "f") for name in _params.FLOATS),
        *((name, "i") for name in _params.FLAGS),
    ]
    places, offset = {}, 0
    for name, code in codes:
        if name == _params.STRIDES[0]:
            offset = _params.STRIDES_AT
        places[name] = (offset, code)
        offset += widths[code]
    assert -(-offset // _tensor_map.ALIGNMENT) * _tensor_map.ALIGNMENT == _params.SIZE
    return places


def compile_asserts(
    lines: list[str], config: str = "", head: str = "", arch: str = "sm_80"
) -> None:
    """Compile `static_assert`s after `head`; a wrong one fails with its own text."""
    checks = "\n".join(f'static_assert({line}, "{line}");' for line in lines)
    sources = {**_sources.read(), "twins.cu": f"{head}\n{checks}\nKERNEL void twins() {{}}\n"}
    _compile.compile_kernel("twins", config, arch, sources)


def test_parameters_lie_where_the_kernel_looks() -> None:
    lines = [f"{OFFSET.format(name)} == {at}" for name, (at, _) in offsets().items()]
    compile_asserts(
        [*lines, f"sizeof(AttentionParams) == {_params.SIZE}"],
        head="#include <attention/params.cuh>",
    )


def test_a_wrong_offset_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="static assertion failed"):
        compile_asserts([f"{OFFSET.format('k')} == 0"], head="#include <attention/params.cuh>")


def test_every_number_is_packed_in_its_place() -> None:
    """All numbers of a problem differ; each is found again at its field's offset."""
    problem = Problem(
        form="paged",
        q=Layout((7, 24, 64), (3001, 3002, 1), "float16"),
        k=Layout((11, 8, 32, 64), (4001, 4002, 4003, 1), "float16"),
        v=Layout((11, 8, 32, 80), (5001, 5002, 5003, 1), "float16"),
        batch=13,
        q_heads=24,
        kv_heads=8,
        head_dim_qk=64,
        head_dim_v=80,
        q_len=7,
        kv_len=992,
        page_size=32,
        causal=True,
        window_left=77,
        soft_cap=2.5,
        skip=SkipMode("scale_factor", True, Layout((13, 24), (6001, 6002), "float32")),
        out_dtype="float16",
        out_shape=(7, 24, 80),
        lse_shape=(7, 24),
    )
    geometry = DecodeGeometry(16, 32, 4, SplitRule(0.125, 202, True))
    plan = Plan("fmha_sm80", FmhaConfig(), 19, (17, 1, 1), 32, 0, geometry, "", 92, (1, 2, 3))
    packed = bytes(8 * len(_params.POINTERS)) + _params.pack_rest(
        problem,
        plan,
        out=(8001, 8002, 1),
        lse=(9001, 9002),
        tables=55,
        scale=0.5,
        out_scale=0.25,
        threshold=1.5,
    )
    seen = {
        name: struct.unpack_from(f"={code}", packed, at)
        for name, (at, code) in offsets().items()
        if code != "Q"
    }
    assert seen == {
        "q_strides": (0, 3001, 3002),
        "k_strides": (4001, 4003, 4002),
        "v_strides": (5001, 5003, 5002),
        "out_strides": (0, 8001, 8002),
        "lse_strides": (0, 9001, 9002),
        "block_table_stride": (55,),
        "threshold_strides": (6001, 6002),
        "batch": (13,),
        "q_heads": (24,),
        "group": (3,),
        "q_len": (7,),
        "kv_len": (992,),
        "q_blocks": (19,),
        "head_dim_qk": (64,),
        "head_dim_v": (80,),
        "page_shift": (5,),
        "pages": (11,),
        "causal": (1,),
        "window_left": (77,),
        "splits.share": (0.125,),
        "splits.smallest": (202,),
        "splits.alone": (1,),
        "kv_heads": (8,),
        "items": (92,),
        "splitting": (1,),
        "scale": (0.5,),
        "out_scale": (0.25,),
        "soft_cap": (2.5,),
        "threshold": (1.5,),
        "threshold_per_length": (1,),
        "unsafe": (1,),
    }


CONFIGS = (
    FmhaConfig,
    FmhaHopperConfig,
    DecodeConfig,
    MlaConfig,
    MlaPortableConfig,
    MergeSplitsConfig,
)


def field_checks(name: str, config: _shipped.Config) -> list[str]:
    """`static_assert` conditions that each field has the value of the Python record."""
    literals = dict(part.split("=") for part in config.define().split(", "))
    return [f"{name}{field} == {value}" for field, value in literals.items()]


@pytest.mark.parametrize("record", CONFIGS)
def test_configurations_have_the_same_fields_and_defaults(record: Any) -> None:
    checks = field_checks(f"{record.__name__}{{}}", record())
    assert len(checks) == len(fields(record))
    compile_asserts(checks, head="#include <attention/config.cuh>")


@pytest.mark.parametrize("record", CONFIGS)
def test_a_configuration_arrives_field_by_field(record: Any) -> None:
    other = {"bfloat16": "float32", False: True, True: False}
    usual = {field.name: field.default for field in fields(record)}
    changed = {
        name: other[x] if isinstance(x, (str, bool)) else x + 16 for name, x in usual.items()
    }
    config = record(**changed)
    assert all(changed[name] != usual[name] for name in usual)
    name = record.__name__
    compile_asserts(
        [*field_checks("config", config), f"config.threads() == {config.threads}"],
        config=config.define(),
        head=f"#include <attention/config.cuh>\nconstexpr {name} config{{CUATTN_CONFIG}};",
    )


@pytest.mark.parametrize(("head_dim_qk", "head_dim_v"), [(64, 64), (192, 128), (96, 256)])
def test_shared_memory_is_what_the_kernel_carves(head_dim_qk: int, head_dim_v: int) -> None:
    problem = problem_of(batched(BATCHED[0]))
    plan = _heuristics.prefill(
        replace(problem, head_dim_qk=head_dim_qk, head_dim_v=head_dim_v), H200
    )
    carved = "QTile::bytes + stages * (KTile::bytes + VTile::bytes)"
    compile_asserts(
        [f"{carved} == {plan.shared_memory}"],
        config=plan.config.define(),
        head=_sources.read()["fmha_sm80.cu"],
    )


@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (72, 256)])
def test_shared_memory_and_maps_of_hopper_prefill(dims: tuple[int, int]) -> None:
    """The carver's parts are multiples of what they are aligned to; four maps end the struct."""
    problem = problem_of(batched(BATCHED[0]))
    plan = _heuristics.hopper_prefill(
        replace(problem, head_dim_qk=dims[0], head_dim_v=dims[1]), H200
    )
    q = "config.consumers * Shared::QTile::bytes"
    tiles = f"{q} + stages * (Shared::KTile::bytes + Shared::VTile::bytes)"
    rest = "2 * 32 + config.consumers * 2 * 16 + (4 * stages + 3) * 8"
    place = "__INTADDR__(&((FmhaHopperParams*)0)->{})"
    names = ("q", "k", "v", "packed_q")
    maps = [_params.SIZE + i * _tensor_map.SIZE for i in range(5)]
    compile_asserts(
        [
            f"{q} % 1024 == 0",
            f"{tiles} + {rest} == {plan.shared_memory}",
            f"config.threads() == {plan.threads}",
            f"config.block_q() == {plan.geometry.block_q}",
            f"group_rows == {plan.geometry.rows_per_vote}",
            *(f"{place.format(n)} == {at}" for n, at in zip(names, maps, strict=False)),
            f"sizeof(FmhaHopperParams) == {maps[4]}",
        ],
        config=plan.config.define(),
        head=_sources.read()["fmha_sm90.cu"],
        arch="sm_90a",
    )


@pytest.mark.parametrize(("block_q", "unit"), [(128, 128), (64, 64), (128, 64), (192, 64)])
def test_heads_share_blocks_of_the_same_requests(block_q: int, unit: int) -> None:
    geometry = Geometry(block_q, 1, 1, pack_rows=unit)
    lengths = (0, 1, block_q // 2, block_q // 2 + 1, block_q, 1 << 30)
    groups = (1, 2, 5, unit, unit + 1, 200)
    packs = {(n, group): geometry.pack(n, group) for n in lengths for group in groups}
    assert {1, 2, 5, unit} == set(packs.values())
    asked = f"pack_of<{block_q}, {unit}>({{}}, {{}}) == {{}}"
    compile_asserts(
        [asked.format(*pair, pack) for pair, pack in packs.items()],
        head="#include <attention/schedule.cuh>",
    )


def test_only_whole_sequences_get_the_tile_of_long_attention() -> None:
    """Elsewhere kv_len is of the whole batch or a bound, on which no bits may depend."""
    usual = replace(problem_of(batched(BATCHED[0])), causal=False, head_dim_qk=128, head_dim_v=128)
    long = _heuristics.HOPPER_LONG
    tiles = {}
    for form, keys in itertools.product(("batched", "ragged", "paged"), (long, 128)):
        problem = replace(usual, form=form, kv_len=keys, batch=1)
        config = _heuristics.hopper_prefill(problem, H200).config
        tiles[form, keys] = config.block_q, config.block_kv
    assert tiles.pop(("batched", long)) == (192, 80)
    assert set(tiles.values()) == {(128, 128)}


DECODE_TILES = [((64, 64), 17), ((192, 128), 4), ((96, 256), 4)]


@pytest.mark.parametrize(("dims", "q_heads"), DECODE_TILES)
def test_shared_memory_of_decode_is_what_the_kernel_carves(
    dims: tuple[int, int], q_heads: int
) -> None:
    """The carver rounds up: each part is a multiple of its alignment, and the last one ends it."""
    case = DecodeCase(d_qk=dims[0], d_v=dims[1], pair=True, q_heads=q_heads, kv_heads=1)
    plan = _heuristics.decode(problem_of_decode(decode_call(case)), H200)
    ring = "config.warps * Shape::ring_bytes"
    rows = "config.warps * config.rows"
    parts = ["Shape::QTile::bytes", ring, f"{rows} * 16", f"{rows} * 8"]
    compile_asserts(
        [
            *(f"({part}) % 1024 == 0" for part in parts[:2]),
            *(f"({part}) % 16 == 0" for part in parts[2:]),
            f"{' + '.join(parts)} + (config.warps + 1) * 4 == {plan.shared_memory}",
            f"config.threads() == {plan.threads}",
        ],
        config=plan.config.define(),
        head=_sources.read()["decode.cu"],
    )


def test_mla_maps_lie_behind_the_parameters() -> None:
    """`wide`, `one` and nothing else; shared memory is asked for as one block takes it."""
    place = "__INTADDR__(&((MlaParams*)0)->{})"
    behind = (_params.SIZE, _params.SIZE + _tensor_map.SIZE)
    config = MlaConfig()
    compile_asserts(
        [
            *(f"{place.format(n)} == {at}" for n, at in zip(("wide", "one"), behind, strict=True)),
            f"sizeof(MlaParams) == {_params.SIZE + 2 * _tensor_map.SIZE}",
            f"alignof(TensorMap) == {_tensor_map.ALIGNMENT}",
            f"config.threads() == {config.threads}",
        ],
        config=config.define(),
        head=_sources.read()["mla_decode_sm90.cu"],
        arch="sm_90a",
    )


@pytest.mark.parametrize(
    ("dims", "rows", "arch"),
    [((512, 64), 16, "sm_86"), ((512, 0), 32, "sm_80"), ((256, 64), 64, "sm_90a")],
)
def test_shared_memory_of_portable_mla_is_what_the_kernel_carves(
    dims: tuple[int, int], rows: int, arch: str
) -> None:
    tile = _heuristics.mla_tile(*dims, rows, _heuristics.SHARED_MEMORY[arch])
    parts = ["config.stages * KvTile::bytes", "QTile::bytes", "PTile::bytes"]
    rows_bytes = "Shape::parts * config.rows * 4"
    compile_asserts(
        [
            *(f"({part}) % 1024 == 0" for part in parts),
            f"({rows_bytes}) % 16 == 0",
            f"{' + '.join(parts)} + 2 * {rows_bytes} + 4 == {tile.shared_memory}",
            f"config.threads() == {tile.threads}",
        ],
        config=tile.define(),
        head=_sources.read()["mla_decode_sm80.cu"],
    )


COUNT_SPLITS = """
#include <attention/decode_work.cuh>
struct Parameters {
  const SplitRule* rules;
  const int64* loads;
  const int32* keys;
  int32* splits;
  int32 count;
};
KERNEL void count_splits(const __grid_constant__ Parameters p) {
  for (int32 i = thread_index(); i < p.count; i += warp_size)
    p.splits[i] = splits_of(p.rules[i], p.keys[i], p.loads[i]);
}
"""


def splits_of(rules: list[SplitRule], keys: list[int], loads: list[int]) -> list[int]:
    """What `splits_of` of decode_work.cuh returns, in the emulator."""
    packed = b"".join(struct.pack("fii", r.share, r.smallest, r.alone) for r in rules)
    with emulator.Memory() as memory:
        places = [
            memory.add("rules", np.frombuffer(packed, np.uint8)),
            memory.add("loads", np.array(loads, np.int64)),
            memory.add("keys", np.array(keys, np.int32)),
            memory.add("splits", np.zeros(len(rules), np.int32), writable=True),
        ]
        params = struct.pack("4Qi4x", *places, len(rules))
        sources = {**_sources.read(), "count_splits.cu": COUNT_SPLITS}
        emulator.run("count_splits", "", 1, 32, params, sources=sources)
        return memory["splits"].tolist()


@pytest.mark.emulator
def test_splits_are_counted_alike() -> None:
    """Few keys and many, parts that end on the last bit of a float32, loads beyond 2^31."""
    shares = [float(np.float32(share)) for share in (1 / 132, 8 / 132, 1 / 3, 2.0)]
    lengths = (0, 1, 255, 256, 511, 512, 2048, 33791, 33792, 33793, 131072, 2**31 - 1)
    totals = (0, 1000, 33792, 2**24 + 1, 132 * 256, 2**31 + 5, 2**33)
    table = [
        (SplitRule(share, smallest, False), keys, load)
        for share, smallest in itertools.product(shares, (256, 2048))
        for keys, load in itertools.product(lengths, totals)
        if load * share < 2**31
    ]
    rules, keys, loads = (list(column) for column in zip(*table, strict=True))
    wanted = [rule.splits(own, load) for rule, own, load in table]
    assert splits_of(rules, keys, loads) == wanted
    assert len(set(wanted)) > 20


def test_cases_share_their_configurations() -> None:
    """The GPU tests must not compile for minutes."""
    skip = SkipMode("threshold", False)
    problems = [
        *(problem_of(batched(case)) for case in BATCHED),
        *(problem_of(ragged(case)) for case in RAGGED_CASES),
        *(problem_of(paged(case)) for case in PAGED_CASES),
        *(problem_of(batched(case), skip) for case in SKIP_CASES),
        *(problem_of(ragged(case), skip) for case in SKIP_RAGGED),
        *(problem_of(paged(case), skip) for case in SKIP_PAGED),
    ]
    plans = [_heuristics.prefill(problem, H200) for problem in problems]
    compiled = {(plan.kernel, plan.config) for plan in plans}
    assert 20 < len(compiled) <= CONFIGURATIONS
    assert len(compiled) * 3 < len(problems)


def test_decode_cases_share_their_configurations() -> None:
    skips = [SkipMode(source, False) for source in ("threshold", "dropped_mass")]
    problems = [
        *(problem_of_decode(decode_call(case)) for case in DECODE),
        *(problem_of_decode(decode_call(case), s) for case in SKIP_DECODE for s in skips),
    ]
    compiled = {_heuristics.decode(problem, H200).config for problem in problems}
    assert 20 < len(compiled) <= DECODE_CONFIGURATIONS
    assert len(compiled) * 3 < len(problems)

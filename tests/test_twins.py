"""C++ and Python twins: the same fields, the same offsets, the same defaults; none needs a GPU.

NVRTC itself is asked: a `static_assert` per field is compiled with the headers of the kernels.
"""

from __future__ import annotations

import struct
from dataclasses import fields, replace

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

from cuattn import _compile, _heuristics, _params, _sources
from cuattn._config import FmhaConfig
from cuattn._records import (
    DecodeGeometry,
    Device,
    Layout,
    Plan,
    Problem,
    SkipMode,
    SplitRule,
)

H200 = Device(0, "NVIDIA H200", (9, 0), "sm_90a", 132, 232448)
OFFSET = "__INTADDR__(&((AttentionParams*)0)->{})"  # NVRTC has no offsetof
CONFIGURATIONS = 60  # compiled once each; about a second apiece


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
        places[name] = (offset, code)
        offset += widths[code]
    assert offset == _params.SIZE
    return places


def compile_asserts(lines: list[str], config: str = "", head: str = "") -> None:
    """Compile `static_assert`s after `head`; a wrong one fails with its own text."""
    checks = "\n".join(f'static_assert({line}, "{line}");' for line in lines)
    sources = {**_sources.read(), "twins.cu": f"{head}\n{checks}\nKERNEL void twins() {{}}\n"}
    _compile.compile_kernel("twins", config, "sm_80", sources)


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


def field_checks(name: str, config: FmhaConfig) -> list[str]:
    """`static_assert` conditions that each field has the value of the Python record."""
    literals = dict(part.split("=") for part in config.define().split(", "))
    return [f"{name}{field} == {value}" for field, value in literals.items()]


def test_configurations_have_the_same_fields_and_defaults() -> None:
    checks = field_checks("FmhaConfig{}", FmhaConfig())
    assert len(checks) == len(fields(FmhaConfig))
    compile_asserts(checks, head="#include <attention/config.cuh>")


def test_a_configuration_arrives_field_by_field() -> None:
    other = {"bfloat16": "float32", False: True, True: False}
    usual = {field.name: field.default for field in fields(FmhaConfig)}
    changed = {name: other[x] if x in other else x + 16 for name, x in usual.items()}
    config = FmhaConfig(**changed)
    assert all(changed[name] != usual[name] for name in usual)
    compile_asserts(
        [*field_checks("config", config), f"config.threads() == {config.threads}"],
        config=config.define(),
        head="#include <attention/config.cuh>\nconstexpr FmhaConfig config{CUATTN_CONFIG};",
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

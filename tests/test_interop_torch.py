"""cuattn as PyTorch operators: the same bits, shapes for compilers, counters, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import decode_cases
import mla_cases
import numpy as np
import pytest
from cases import GARBAGE_PAGES, Call, Case, batched, paged, ragged
from compare import assert_same_bits, bits
from decode_cases import DecodeCase, decode_call

import cuattn

torch = pytest.importorskip("torch", reason="the operators are PyTorch's, which is not installed")

from cuattn.interop import _torch_operators  # noqa: E402
from cuattn.interop import torch as attention  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STRUCTURED = Case(lengths=((150, 400),), data="structured", scale=0.25)


def tensor(device: Any, array: Any) -> Any:
    """A tensor over the memory of an array on the device."""
    if isinstance(array, tuple):
        return tuple(tensor(device, part) for part in array)
    if not isinstance(array, device.xp.ndarray):
        return array
    if device.xp is np and array.dtype.name == "bfloat16":  # which NumPy does not hand out
        return torch.from_numpy(array.view("i2")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def array(x: Any) -> Any:
    """A NumPy copy of a tensor, of the dtypes that NumPy has: bits of bfloat16."""
    x = x.cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def asked(device: Any, call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function of a call, and its arguments as tensors."""
    arrays, options = device.arguments(call)
    given = {name: tensor(device, value) for name, value in options.items()}
    if "out_dtype" in given:
        given["out_dtype"] = DTYPES[given["out_dtype"]]
    return getattr(attention, call.function), tuple(tensor(device, x) for x in arrays), given


def same(seen: Any, wanted: Any, rows: Any, case: Case) -> None:
    """Demand the same bits in the rows that belong to requests."""
    assert isinstance(seen, torch.Tensor) and seen.is_contiguous()
    assert tuple(seen.shape) == wanted.shape
    assert str(seen.dtype) == f"torch.{wanted.dtype.name}"
    found = array(seen)
    assert_same_bits(bits(found)[rows], bits(wanted)[rows], case)


CALLS = [
    batched(Case()),
    batched(Case(soft_cap=20.0, sinks=True)),
    batched(Case(scale=0.2, out_scale=0.5, device_scalars=True)),
    ragged(Case(lengths=((7, 64), (33, 20), (5, 0)))),
    paged(Case(layout="NHD", pair=True, lengths=((7, 64), (33, 20)))),
    batched(Case(out_dtype="float32")),
    decode_call(decode_cases.USUAL),
    decode_call(decode_cases.UNEVEN),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.function}-{call.case}")
def test_gives_the_bits_that_cuattn_gives(device: Any, call: Call) -> None:
    wanted = device.run(call)
    function, tensors, options = asked(device, call)
    rows = ~np.isnan(wanted.lse)
    out, lse = function(*tensors, **options, return_lse=True)
    same(out, wanted.out, rows, call.case)
    same(lse, wanted.lse, rows, call.case)
    same(function(*tensors, **options), wanted.out, rows, call.case)


@pytest.mark.parametrize("case", [mla_cases.USUAL, mla_cases.SPARSE[0]], ids=str)
def test_mla_decode_gives_the_bits_that_cuattn_gives(device: Any, case: Any) -> None:
    call = mla_cases.mla_call(case)
    wanted = device.run(call)
    function, tensors, options = asked(device, call)
    out, lse = function(*tensors, **options, return_lse=True)
    same(out, wanted.out, ..., call.case)
    same(lse, wanted.lse, ..., call.case)


def test_mla_decode_skips(hopper: Any) -> None:
    call = mla_cases.mla_call(mla_cases.SHORT)
    function, tensors, options = asked(hopper, call)
    stats = attention.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.05, stats=stats, certificate=True)
    out, lost = function(*tensors, **options, skip_softmax=skip)
    assert 0 < stats.skipped < stats.visited
    usual = cuattn.SkipSoftmax(threshold=0.05, certificate=True)
    arrays, given = hopper.arguments(call)
    wanted = cuattn.mla_decode(*arrays, **given, skip_softmax=usual)
    for seen, x in zip((out, lost), wanted, strict=True):
        same(seen, hopper.to_host(x), ..., call.case)
    assert (array(lost) > 0).any()


@pytest.mark.parametrize("stacked", [False, True])
def test_merge_states_merges(device: Any, stacked: bool) -> None:
    rng = np.random.default_rng(3)
    outs = [rng.standard_normal((5, 2, 64)).astype(np.float16) for _ in range(3)]
    lses = [rng.standard_normal((5, 2)).astype(np.float32) for _ in range(3)]
    parts = [[device.to_device(x) for x in group] for group in (outs, lses)]
    wanted = cuattn.merge_states(*parts, out_dtype="float32")
    given: list[Any] = [[tensor(device, x) for x in group] for group in parts]
    if stacked:
        given = [torch.stack(group) for group in given]
    seen = attention.merge_states(*given, out_dtype=torch.float32)
    for x, y in zip(seen, wanted, strict=True):
        same(x, device.to_host(y), ..., USUAL)


USUAL = Case()


@pytest.mark.parametrize("form", ["whole", "pair", "mla"])
def test_appended_tokens_are_in_the_cache(device: Any, form: str) -> None:
    rng = np.random.default_rng(4)
    shape = {"whole": (5, 2, 2, 16, 64), "pair": (5, 2, 16, 64), "mla": (5, 16, 128)}[form]
    caches = [rng.standard_normal(shape).astype(np.float16) for _ in range(1 + (form == "pair"))]
    new = [
        rng.standard_normal((3, 64) if form == "mla" else (3, 2, 64)).astype(np.float16)
        for _ in range(2)
    ]
    tables = np.array([[3, GARBAGE_PAGES[0]], [1, 4]], np.int32)
    lengths, ends = np.array([9, 18], np.int32), np.array([0, 1, 3], np.int32)
    function = "append_mla_kv" if form == "mla" else "append_kv"
    ours, theirs = ([device.to_device(x) for x in caches] for _ in range(2))
    rest = [device.to_device(x) for x in (*new, tables, lengths, ends)]
    getattr(cuattn, function)(ours if form == "pair" else ours[0], *rest)
    tensors = [tensor(device, x) for x in theirs]
    given = [tensor(device, x) for x in rest]
    result = getattr(attention, function)(tensors if form == "pair" else tensors[0], *given)
    assert result is None
    for mine, yours, before in zip(ours, theirs, caches, strict=True):
        assert_same_bits(device.to_host(yours), device.to_host(mine), USUAL)
        assert not np.array_equal(device.to_host(yours), before)


# --- skipping ------------------------------------------------------------------------------------

SKIPS: list[tuple[Call, dict[str, Any]]] = [
    (batched(STRUCTURED), {"threshold": 0.5}),
    (batched(STRUCTURED), {"threshold_scale_factor": 200.0}),
    (
        ragged(replace(STRUCTURED, lengths=((150, 400), (7, 64)))),
        {"threshold": 0.5, "certificate": True},
    ),
    (paged(STRUCTURED), {"threshold": 0.5, "certificate": True}),
    (decode_call(decode_cases.LONG), {"threshold": 0.2, "certificate": True}),
    (decode_call(decode_cases.LONG), {"max_dropped_mass": 0.02, "certificate": True}),
]


@pytest.mark.parametrize(
    ("call", "fields"), SKIPS, ids=lambda x: x.function if isinstance(x, Call) else "-".join(x)
)
def test_skips_and_counts_as_cuattn_does(device: Any, call: Call, fields: Any) -> None:
    plain, ours = cuattn.SkipStats(), attention.SkipStats()
    wanted = device.run(call, skip_softmax=cuattn.SkipSoftmax(**fields, stats=plain))
    function, tensors, options = asked(device, call)
    options["skip_softmax"] = cuattn.SkipSoftmax(**fields, stats=ours)
    seen = function(*tensors, **options, return_lse=True)
    rows = ~np.isnan(wanted.lse)
    results = [wanted.out, wanted.lse, *filter(lambda x: x is not None, [wanted.dropped_mass])]
    for x, y in zip(seen, results, strict=True):
        same(x, y, rows, call.case)
    assert 0 < ours.skipped < ours.visited
    for plane, counted in plain.per_head().items():
        np.testing.assert_array_equal(ours.per_head()[plane], counted)
    function(*tensors, **options)
    assert ours.skipped == 2 * plain.skipped
    ours.reset()
    assert (ours.visited, ours.rate) == (0, 0.0)


def test_a_live_threshold_is_a_tensor(device: Any) -> None:
    function, tensors, options = asked(device, batched(STRUCTURED))
    stats = attention.SkipStats(batch=1, heads=4, device=tensors[0].device)
    live = torch.full((1, 4), 0.0, device=tensors[0].device)
    options["skip_softmax"] = cuattn.SkipSoftmax(threshold=live, stats=stats)
    function(*tensors, **options)
    assert stats.visited > 0 and stats.skipped == 0
    live[:, 1] = 0.5
    function(*tensors, **options)
    skipped = stats.per_head()["skipped"][0]
    assert skipped[1] > 0 and skipped.sum() == skipped[1]


def test_seeds_are_a_tensor(device: Any) -> None:
    call = decode_call(decode_cases.LONG)
    seeds = torch.full((2, 8), -torch.inf, device=on(device))
    seeds[0] = 1e3  # so far above that of this request only seed tiles stay
    stats = attention.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.001, seeds=seeds, stats=stats)
    wanted = device.run(call, skip_softmax=replace(skip, stats=None))
    function, tensors, options = asked(device, call)
    seen = function(*tensors, **options, skip_softmax=skip, return_lse=True)
    for x, y in zip(seen, (wanted.out, wanted.lse), strict=True):
        same(x, y, ~np.isnan(wanted.lse), call.case)
    skipped = stats.per_head()["skipped"].sum(axis=1)
    assert skipped[0] > skipped[1]
    with pytest.raises(TypeError, match=r"skip_softmax\.seeds is a ndarray; wanted a torch.Tensor"):
        function(*tensors, skip_softmax=cuattn.SkipSoftmax(threshold=0.1, seeds=np.zeros((2, 8))))
    with pytest.raises(ValueError, match="skip_softmax has seeds, which prefill cannot use"):
        x = torch.ones((1, 4, 2, 64), dtype=torch.bfloat16, device=on(device))
        attention.prefill(x, x, x, skip_softmax=replace(skip, stats=None))


def test_counters_of_another_size_follow_a_reset(device: Any) -> None:
    stats = attention.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats)
    q = torch.zeros((2, 4, 2, 64), dtype=torch.bfloat16, device=on(device))
    attention.prefill(q, q, q, skip_softmax=skip)
    with pytest.raises(ValueError, match=r"reset\(\) first"):
        attention.prefill(q[:1], q[:1], q[:1], skip_softmax=skip)
    stats.reset()
    attention.prefill(q[:1], q[:1], q[:1], skip_softmax=skip)
    assert stats.per_head()["visited"].shape == (1, 2)


def on(device: Any) -> str:
    return "cpu" if device.xp is np else "cuda"


# --- operators -----------------------------------------------------------------------------------


def test_options_are_those_of_the_schema() -> None:
    named = re.findall(r"(\w+)(?:,|$)", _torch_operators.OPTIONS)
    assert tuple(named) == _torch_operators.Options._fields
    counts = torch.ops.cuattn.prefill.default._schema.arguments[-3]
    assert counts.name == "counts" and counts.alias_info.is_write


class Recorded:
    """The arguments with which operators were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        monkeypatch.setattr(attention, "_operators", self)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self.calls.append((name, given))
            return getattr(torch.ops.cuattn, name)(*given)

        return call


def checked(device: Any, recorded: Recorded) -> None:
    """Let PyTorch check every operator that was called: schema, shapes, functional form."""
    for name, given in recorded.calls:
        operator = getattr(torch.ops.cuattn, name).default
        torch.library.opcheck(operator, given)


@pytest.mark.parametrize("function", ["prefill", "prefill_ragged", "prefill_paged", "decode"])
def test_opcheck_of_attention(device: Any, function: str, monkeypatch: Any) -> None:
    case = Case(lengths=((5, 70), (9, 70)))
    call = {
        "prefill": batched(replace(case, lengths=((5, 70), (5, 70)))),
        "prefill_ragged": ragged(case),
        "prefill_paged": paged(case),
        "decode": decode_call(DecodeCase(lengths=((1, 70), (1, 40)))),
    }[function]
    recorded = Recorded(monkeypatch)
    run, tensors, options = asked(device, call)
    q, *rest = tensors
    # Each token is a request's: what is not written would differ from run to run.
    q = q[: 5 + 9] if q.dim() == 3 and function != "decode" else q
    run(q, *rest, **options, return_lse=True)
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=attention.SkipStats())
    run(q, *rest, **options, skip_softmax=skip)
    checked(device, recorded)


def test_opcheck_of_the_others(device: Any, monkeypatch: Any) -> None:
    recorded = Recorded(monkeypatch)
    for case in (mla_cases.USUAL, mla_cases.SPARSE[0]):
        run, tensors, options = asked(device, mla_cases.mla_call(case))
        run(*tensors, **options, return_lse=True)
    new = torch.ones((2, 2, 64), dtype=torch.float16, device=on(device))
    attention.merge_states([new, new], [new[..., 0].float()] * 2)
    cache = torch.zeros((4, 2, 16, 64), dtype=torch.float16, device=on(device))
    tables, lengths = (
        torch.tensor(x, dtype=torch.int32, device=on(device)) for x in ([[0], [2]], [3, 9])
    )
    attention.append_kv((cache, cache.clone()), new, new, tables, lengths)
    attention.append_mla_kv(
        cache[:, 0].contiguous(), new[:, 0, :40], new[:, 0, 40:], tables, lengths
    )
    checked(device, recorded)
    assert len(recorded.calls) == 5


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_counters(device: Any, backend: str) -> None:
    _, (q, k, v), _ = asked(device, batched(STRUCTURED))
    stats = attention.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats)

    def layer(q: Any, k: Any, v: Any) -> Any:
        out, lse = attention.prefill(
            2 * q, k, v, causal=True, scale=0.125, skip_softmax=skip, return_lse=True
        )
        return out + 1, lse

    wanted = layer(q, k, v)
    once = stats.per_head()
    stats.reset()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for calls in (1, 2):
        for seen, right in zip(compiled(q, k, v), wanted, strict=True):
            assert torch.equal(seen, right)
        assert (stats.per_head()["skipped"] == calls * once["skipped"]).all()
    assert 0 < once["skipped"].sum() < once["visited"].sum()


def test_compiles_before_the_first_count(device: Any) -> None:
    """Counters made inside of the graph are those that later calls add to."""
    _, (q, k, v), _ = asked(device, batched(STRUCTURED))
    stats = attention.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q: Any, k: Any, v: Any) -> Any:
        return attention.prefill(q, k, v, causal=True, scale=0.25, skip_softmax=skip)

    layer(q, k, v)
    once = stats.skipped
    layer(q, k, v)
    assert stats.skipped == 2 * once > 0


def test_compiles_a_step_of_decode_for_any_batch(device: Any) -> None:
    """New tokens appended and attended to: the cache is changed in place, sizes are symbols."""
    from torch._dynamo.testing import CompileCounterWithBackend

    place = on(device)

    def step(q: Any, k: Any, v: Any, cache: Any, tables: Any, lengths: Any) -> Any:
        attention.append_kv(cache, k, v, tables, lengths)
        return attention.decode(q, cache, tables, lengths).relu()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for batch in (5, 7):  # no other size is the same: that would be a kind of its own
        cache = torch.randn((9, 2, 2, 16, 64)).to(place, torch.bfloat16)
        q, k = (torch.randn((batch, n, 64)).to(place, torch.bfloat16) for n in (4, 2))
        tables = torch.arange(batch, dtype=torch.int32, device=place)[:, None]
        lengths = torch.full((batch,), 11, dtype=torch.int32, device=place)
        other = cache.clone()
        wanted = step(q, k, k, cache, tables, lengths)
        assert torch.equal(compiled(q, k, k, other, tables, lengths), wanted)
        assert torch.equal(cache, other) and wanted.any()
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] == compilations[1]


# --- what is refused -----------------------------------------------------------------------------


def test_gradients_are_refused(device: Any) -> None:
    q = torch.ones((1, 4, 2, 64), dtype=torch.bfloat16, device=on(device), requires_grad=True)
    k = q.detach()
    with pytest.raises(ValueError, match=r"q requires grad; wanted torch\.no_grad"):
        attention.prefill(q, k, k)
    with pytest.raises(ValueError, match=r"outs\[1\] requires grad"):
        attention.merge_states([k, q], [k[..., 0].float()] * 2)
    with torch.no_grad():
        out = attention.prefill(q, k, k)
    assert not out.requires_grad and (out == 1).all()


def test_what_is_no_tensor_is_refused(device: Any) -> None:
    x = torch.ones((1, 4, 2, 64), dtype=torch.bfloat16, device=on(device))
    for name, given, options in (
        ("k is a list", (x, [1], x), {}),
        ("sinks is a ndarray", (x, x, x), {"sinks": np.ones(2, np.float32)}),
        ("scale is 'a'; wanted a number", (x, x, x), {"scale": "a"}),
        ("skip_softmax is a float", (x, x, x), {"skip_softmax": 0.1}),
    ):
        with pytest.raises(TypeError, match=name):
            attention.prefill(*given, **options)
    with pytest.raises(ValueError, match="k has head_dim 32; wanted q's 64"):  # as cuattn says it
        attention.prefill(x, x[..., :32], x)


def test_counters_go_with_their_functions(device: Any) -> None:
    x = torch.ones((1, 4, 2, 64), dtype=torch.bfloat16, device=on(device))
    for function, stats in ((attention, cuattn.SkipStats()), (cuattn, attention.SkipStats())):
        skip = cuattn.SkipSoftmax(threshold=0.1, stats=stats)
        with pytest.raises(TypeError, match=r"stats is a .*; wanted a"):
            function.prefill(x, x, x, skip_softmax=skip)
    with pytest.raises(TypeError, match="batch=1, heads=None and device=None; wanted all three"):
        attention.SkipStats(batch=1)


def test_cpu_tensors_want_the_emulator() -> None:
    x = torch.ones((1, 4, 2, 64), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q is on the CPU .*cuattn\.emulator\.enabled"):
        attention.prefill(x, x, x)

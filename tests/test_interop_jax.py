"""cuattn inside `jax.jit`: the bits of the eager calls, shapes without running, and refusals.

They run where JAX computes: on a GPU, or on the CPU in the emulator.
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from compare import assert_same_bits
from conftest import missing_compiler, missing_gpu
from numpy.typing import NDArray

import cuattn

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
from cuattn.interop import jax as interop  # noqa: E402

Array = NDArray[Any]
LENGTHS = np.array([41, 0, 64], np.int32)
TABLES = np.array([[5, 2, 9, -1], [-1, -1, -1, -1], [0, 7, 3, 4]], np.int32)
ENDS = np.array([0, 3, 3, 5], np.int32)  # of new tokens
PAGE = 16
SPARSE = np.random.default_rng(0).integers(0, 10 * PAGE, (3, 64)).astype(np.int32)


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[Any]]:
    """The emulator for JAX on the CPU; on a GPU its list stays empty."""
    if jax.default_backend() == "cpu":
        if reason := missing_compiler():
            pytest.skip(reason)
    elif reason := missing_gpu():
        pytest.skip(reason)
    with cuattn.emulator.enabled() as launches:
        yield launches


def made(*shape: int, dtype: Any = np.float16, seed: int = 0) -> Any:
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def on_device(x: Any) -> Any:
    """JAX takes NumPy's arrays, cuattn's own functions take none that are not on the device."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def host(x: Any) -> Array:
    return x.get() if hasattr(x, "get") else np.asarray(x)


def mla_cache() -> Any:
    return made(10, PAGE, 576)


@dataclass(frozen=True)
class Case:
    """A call: its arrays, and options of which arrays are traced, too."""

    function: str
    arrays: Callable[[], tuple[Any, ...]]
    options: Callable[[], dict[str, Any]]

    def __str__(self) -> str:
        return self.function

    def jitted(self, **more: Any) -> list[Array]:
        """Results inside of `jax.jit`."""
        function = getattr(interop, self.function)
        options = self.options()
        traced = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
        static = {name: x for name, x in options.items() if name not in traced}
        run = jax.jit(lambda arrays, traced: function(*arrays, **static, **traced, **more))
        return [host(x) for x in jax.tree.leaves(run(self.arrays(), traced))]

    def eager(self, **more: Any) -> list[Array]:
        """Results of cuattn's own function on JAX's arrays."""
        arrays = [on_device(x) for x in self.arrays()]
        results = getattr(cuattn, self.function)(*arrays, **self.options(), **more)
        return [host(x) for x in results] if isinstance(results, tuple) else [host(results)]


def one(value: float) -> Any:
    return jnp.full((), value, jnp.float32)


CASES = (
    Case(
        "prefill",
        lambda: (made(2, 33, 4, 64), made(2, 40, 2, 64), made(2, 40, 2, 64, seed=1)),
        lambda: {
            "causal": True,
            "scale": one(0.2),
            "sinks": jnp.array([0.5, -1.0, 0.0, 3.0]),
            "out_dtype": jnp.float32,
        },
    ),
    Case(
        "prefill_ragged",
        lambda: (made(5, 4, 64), *[made(5, 2, 64, seed=i) for i in (1, 2)], ENDS, ENDS),
        lambda: {"causal": True, "window_left": 1, "soft_cap": 5.0},
    ),
    Case(
        "prefill_paged",
        lambda: (
            made(5, 4, 64),
            tuple(made(10, PAGE, 2, 64, seed=i) for i in (1, 2)),
            *map(jnp.asarray, (TABLES, LENGTHS, ENDS)),
        ),
        lambda: {"layout": "NHD", "out_scale": one(0.5)},
    ),
    Case(
        "decode",
        lambda: (made(3, 2, 4, 64), made(10, 2, 2, PAGE, 64), TABLES, jnp.asarray(LENGTHS)),
        lambda: {"scale": 0.25, "batch_invariant": True},
    ),
    Case(
        "mla_decode",
        lambda: (made(3, 4, 576), mla_cache(), None, LENGTHS),
        lambda: {"scale": 0.05, "sparse_indices": jnp.asarray(SPARSE), "latent_dim": 512},
    ),
    Case(
        "mla_decode",
        lambda: (made(5, 4, 576), mla_cache(), TABLES, LENGTHS),
        lambda: {"scale": 0.05, "cu_seqlens_q": jnp.asarray(ENDS)},
    ),
)
BY_NAME = {case.function: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_the_bits_of_an_eager_call(case: Case) -> None:
    seen, expected = case.jitted(return_lse=True), case.eager(return_lse=True)
    assert len(seen) == len(expected) == 2
    for x, y in zip(seen, expected, strict=True):
        assert_same_bits(x, y, case)
        assert np.isfinite(x).any()


@pytest.mark.parametrize("stacked", [True, False])
def test_merge_states(stacked: bool) -> None:
    outs, lses = made(3, 9, 4, 64), made(3, 9, 4, dtype=np.float32)
    parts = (outs, lses) if stacked else (list(outs), list(lses))
    seen = jax.jit(interop.merge_states)(*parts)
    for x, y in zip(seen, cuattn.merge_states(outs, lses), strict=True):
        assert_same_bits(host(x), host(y), "merge_states")


# --- skipping ------------------------------------------------------------------------------------


def paragraphs() -> tuple[Any, Any, Any]:
    """Queries that have only their own stretch of 64 keys."""
    topic = np.repeat(10 * np.eye(4, 64, dtype=np.float32), 64, axis=0)[None, :, None]
    q = jnp.asarray(np.broadcast_to(topic, (1, 256, 2, 64)), jnp.float16)
    return q, q, made(1, 256, 2, 64)


def test_a_traced_threshold_and_its_votes() -> None:
    arrays = paragraphs()

    @jax.jit
    def attend(threshold: Any) -> Any:
        skip = cuattn.SkipSoftmax(threshold=threshold, certificate=True)
        return interop.prefill(*arrays, skip_softmax=skip, return_counts=True)

    for threshold in (0.0, 0.01):
        stats = cuattn.SkipStats()
        live = jnp.array([threshold], jnp.float32)
        skip = cuattn.SkipSoftmax(threshold=live, stats=stats, certificate=True)
        expected, wanted = cuattn.prefill(*arrays, skip_softmax=skip)
        out, lost, counts = attend(live)
        assert_same_bits(host(out), host(expected), "prefill")
        assert_same_bits(host(lost), host(wanted), "certificate")
        assert (host(lost) > 0).any() == (threshold > 0)
        assert counts.dtype == np.uint32
        np.testing.assert_array_equal(counts, np.stack(list(stats.per_head().values())))
        visited, skipped, _ = np.asarray(counts)
        assert (visited > 0).all()
        assert (skipped < visited).all()
        assert (skipped > 0).all() == (threshold > 0)


def test_decode_returns_what_was_lost_before_the_votes() -> None:
    skip = cuattn.SkipSoftmax(max_dropped_mass=0.05, certificate=True)
    k, v = made(40, 2, PAGE, 64), made(40, 2, PAGE, 64, seed=1)
    rest = ((k, v), jnp.arange(40, dtype=jnp.int32)[None], jnp.array([640], jnp.int32))
    q = 3 * k[-1:, :, -1]  # looks for the last key
    expected = cuattn.decode(q, *rest, skip_softmax=skip, return_lse=True)
    run = jax.jit(
        lambda q: interop.decode(q, *rest, skip_softmax=skip, return_lse=True, return_counts=True)
    )
    *seen, counts = run(q)
    for x, y in zip(seen, expected, strict=True):
        assert_same_bits(host(x), host(y), "decode")
    visited, skipped, _ = np.asarray(counts)
    assert (skipped > 0).all() and (skipped < visited).all()
    assert (host(seen[-1]) > 0).all()


def test_traced_seeds() -> None:
    """Seeds that know of far larger scores leave fewer tiles than those that know nothing."""
    k, v = made(40, 2, PAGE, 64), made(40, 2, PAGE, 64, seed=1)
    tables, lengths = jnp.arange(40, dtype=jnp.int32)[None], jnp.array([640], jnp.int32)

    @jax.jit
    def attend(seeds: Any) -> Any:
        skip = cuattn.SkipSoftmax(threshold=0.01, seeds=seeds)
        return interop.decode(v[-1:, :, -1], (k, v), tables, lengths, skip_softmax=skip)

    outs = []
    for value in (-np.inf, 100.0):
        seeds = jnp.full((1, 2), value, jnp.float32)
        skip = cuattn.SkipSoftmax(threshold=0.01, seeds=seeds)
        outs.append(cuattn.decode(v[-1:, :, -1], (k, v), tables, lengths, skip_softmax=skip))
        assert_same_bits(host(attend(seeds)), host(outs[-1]), "decode")
    assert (host(outs[0]) != host(outs[1])).any()


# --- transformations -----------------------------------------------------------------------------


def test_vmap_of_prefill_joins_the_batch(launches: list[Any]) -> None:
    q, k, v = made(3, 2, 20, 4, 64), made(2, 24, 2, 64), made(3, 2, 24, 2, 64)
    thresholds = jnp.array([[0.0, 0.5]] * 3, jnp.float32)

    def attend(q: Any, k: Any, v: Any, threshold: Any) -> Any:
        skip = cuattn.SkipSoftmax(threshold=threshold, certificate=True)
        options = {"causal": True, "skip_softmax": skip, "return_counts": True}
        return interop.prefill(q, k, v, return_lse=True, **options)

    mapped = jax.jit(jax.vmap(attend, in_axes=(0, None, 0, 0)))(q, k, v, thresholds)
    jax.block_until_ready(mapped)
    assert len(launches) <= 1
    for i in range(3):
        for x, y in zip(mapped, attend(q[i], k, v[i], thresholds[i]), strict=True):
            assert_same_bits(host(x[i]), host(y), f"index {i}")


def test_vmap_of_decode_joins_the_batch_over_one_cache(launches: list[Any]) -> None:
    _, cache, tables, lengths = BY_NAME["decode"].arrays()
    q, tables = made(2, 3, 4, 64), jnp.stack([tables, tables[::-1]])
    lengths = jnp.stack([lengths, lengths[::-1]])

    def attend(q: Any, tables: Any, lengths: Any) -> Any:
        return interop.decode(q, cache, tables, lengths, batch_invariant=True)

    mapped = host(jax.vmap(attend)(q, tables, lengths))
    assert len(launches) <= 1
    for i in range(2):
        assert_same_bits(mapped[i], host(attend(q[i], tables[i], lengths[i])), f"index {i}")


def test_vmap_of_what_no_batch_holds_runs_one_by_one() -> None:
    arrays, scales = BY_NAME["prefill"].arrays(), jnp.array([0.1, 0.3])

    def attend(scale: Any) -> Any:
        return interop.prefill(*arrays, scale=scale)

    mapped = host(jax.jit(jax.vmap(attend))(scales))
    assert (mapped[0] != mapped[1]).any()
    for i in range(2):
        assert_same_bits(mapped[i], host(attend(scales[i])), f"index {i}")


def test_grad_is_refused_and_stop_gradient_helps() -> None:
    arrays = BY_NAME["prefill"].arrays()

    def loss(q: Any) -> Any:
        return interop.prefill(q, *arrays[1:]).astype(jnp.float32).sum()

    with pytest.raises(TypeError, match=r"jax\.prefill has no gradient.*stop_gradient"):
        jax.grad(loss)(arrays[0])
    around = jax.grad(lambda q: loss(jax.lax.stop_gradient(q)) + q.sum().astype(jnp.float32))
    np.testing.assert_array_equal(around(arrays[0]), np.ones(arrays[0].shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eval_shape_runs_nothing(case: Case, launches: list[Any]) -> None:
    function, arrays = getattr(interop, case.function), case.arrays()
    seen = jax.eval_shape(lambda: function(*arrays, **case.options(), return_lse=True))
    q = arrays[0]
    dim = 512 if case.function == "mla_decode" else 64
    dtype = case.options().get("out_dtype", q.dtype)
    assert [x.shape for x in seen] == [(*q.shape[:-1], dim), q.shape[:-1]]
    assert [x.dtype for x in seen] == [dtype, np.float32]
    assert not launches


def test_the_docstrings_examples() -> None:
    failed, attempted = doctest.testmod(interop)
    assert attempted and not failed


@pytest.mark.parametrize("name", interop.__all__)
def test_takes_what_cuattn_takes(name: str) -> None:
    """All arguments but those that make no sense under JAX, with the same defaults."""
    own, other = (inspect.signature(getattr(m, name)).parameters for m in (interop, cuattn))
    left_out = {"out", "lse", "stream"}
    wanted = {key: x.default for key, x in other.items() if key not in left_out}
    if "skip_softmax" in wanted:
        wanted["return_counts"] = False
    assert {key: x.default for key, x in own.items()} == wanted


def test_equal_calls_are_compiled_once() -> None:
    arrays = BY_NAME["prefill"].arrays()
    first = jax.make_jaxpr(lambda: interop.prefill(*arrays, causal=True))()
    second = jax.make_jaxpr(lambda: interop.prefill(*arrays, causal=True))()
    other = jax.make_jaxpr(lambda: interop.prefill(*arrays))()

    def callback(jaxpr: Any) -> Any:
        while "callback" not in jaxpr.eqns[-1].params:
            (jaxpr,) = (x for x in jaxpr.eqns[-1].params.values() if hasattr(x, "eqns"))
        return jaxpr.eqns[-1].params["callback"]

    assert callback(first) == callback(second) != callback(other)
    assert hash(callback(first)) == hash(callback(second))


# --- new tokens ----------------------------------------------------------------------------------


def test_tokens_in_a_scan_equal_prefill_of_everything() -> None:
    """A donated cache, appended to and attended over, token after token in one program."""
    q, k, v = made(20, 4, 64), made(20, 2, 64), made(20, 2, 64, seed=1)
    tables = jnp.array([[1, 0]], jnp.int32)

    def generate(cache: Any) -> Any:
        def step(carry: Any, token: Any) -> Any:
            cache, length = carry
            new_q, new_k, new_v = (x[None] for x in token)
            cache = interop.append_kv(cache, new_k, new_v, tables, length)
            return (cache, length + 1), interop.decode(new_q, cache, tables, length)[0]

        return jax.lax.scan(step, (cache, jnp.array([1], jnp.int32)), (q, k, v))

    cache = jnp.zeros((2, 2, 2, PAGE, 64), jnp.float16)
    (after, _), outs = jax.jit(generate, donate_argnums=0)(cache)
    assert cache.is_deleted()
    np.testing.assert_array_equal(after[1, 0].swapaxes(0, 1), k[:PAGE])
    expected = host(cuattn.prefill(q[None], k[None], v[None], causal=True))[0]
    error = np.abs(host(outs).astype(np.float32) - expected.astype(np.float32)).max()
    assert error <= 2.0**-9 * np.abs(expected).max()  # two roundings to float16


def test_append_leaves_a_cache_that_is_not_donated() -> None:
    cache = tuple(jnp.zeros((10, PAGE, 2, 64), jnp.float16) for _ in range(2))
    k, v = made(5, 2, 64), made(5, 2, 64, seed=1)
    rest = (k, v, TABLES, LENGTHS, ENDS)
    after = jax.jit(lambda cache: interop.append_kv(cache, *rest, layout="NHD"))(cache)
    assert isinstance(after, tuple)
    assert not any(x.any() for x in cache)
    np.testing.assert_array_equal(after[0][4, 14:], k[3:])
    np.testing.assert_array_equal(after[1][4, 14:], v[3:])
    np.testing.assert_array_equal(after[1][9, 6:9], v[:3])
    assert np.count_nonzero(after[0]) == np.count_nonzero(k)


def test_append_to_an_mla_cache() -> None:
    c_kv, k_pe = made(3, 512), made(3, 64)
    after = jax.jit(interop.append_mla_kv)(mla_cache() * 0, c_kv, k_pe, TABLES, LENGTHS)
    np.testing.assert_array_equal(after[4, 15], jnp.concatenate([c_kv[2], k_pe[2]]))
    assert np.count_nonzero(after) == np.count_nonzero(c_kv[::2]) + np.count_nonzero(k_pe[::2])


# --- refusals ------------------------------------------------------------------------------------

X = np.zeros((1, 8, 2, 64), np.float16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": [X]}, "k is a list; wanted a JAX array"),
        ({"k": X[:, :, :, :32]}, "k has head_dim 32; wanted q's 64"),
        ({"v": X.astype(np.float32)}, "v is float32; wanted bfloat16 or float16"),
        ({"sinks": X[0, :3, 0, 0].astype(np.float32)}, r"sinks has shape \(3,\)"),
        ({"scale": np.ones(2, np.float32)}, r"scale has shape \(2,\); wanted a positive number"),
        ({"scale": "large"}, "scale is a str; wanted a JAX array"),
        ({"causal": 1}, "causal is 1; wanted True or False"),
        ({"skip_softmax": 0.1}, "skip_softmax is a float; wanted a SkipSoftmax"),
        (
            {"skip_softmax": cuattn.SkipSoftmax(threshold=0.1, seeds=X[..., 0].astype("f4"))},
            "skip_softmax has seeds, which prefill cannot use; wanted None",
        ),
        ({"return_counts": True}, "return_counts is True without skip_softmax"),
        (
            {"skip_softmax": cuattn.SkipSoftmax(threshold=0.1, stats=cuattn.SkipStats())},
            "skip_softmax has stats, which count in place; wanted stats=None and return_counts",
        ),
        (
            {"skip_softmax": cuattn.SkipSoftmax(max_dropped_mass=0.1)},
            "max_dropped_mass=0.1, which prefill cannot honour",
        ),
    ],
)
def test_wrong_arguments_are_refused_while_tracing(
    options: dict[str, Any], words: str, launches: list[Any]
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        jax.jit(lambda q: interop.prefill(**{"q": q, "k": X, "v": X, **options}))(X)
    assert not launches


def test_the_cpu_is_refused_without_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("JAX computes on a GPU here")
    monkeypatch.setattr(cuattn._host, "in_force", [])
    monkeypatch.delenv("CUATTN_EMULATOR", raising=False)
    with pytest.raises(Exception, match=r"q is on the CPU .*CUATTN_EMULATOR=1"):
        jax.block_until_ready(jax.jit(lambda: interop.prefill(X, X, X))())


def test_a_buffer_becomes_a_cupy_array_without_a_copy() -> None:
    """What the GPU's side does with XLA's buffers; on the CPU with their addresses alone."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from jax.experimental.buffer_callback import buffer_callback

    from cuattn.interop._jax_call import cupy_array

    seen = []

    def look(context: Any, result: Any, x: Any) -> None:
        on_host = x.__dlpack_device__()[0] == 1
        array = cupy_array(x, 0 if on_host else context.stream)
        place = np.asarray(x).ctypes.data if on_host else array.data.ptr  # a GPU's says no more
        seen.append((array.shape, array.dtype.name, array.strides, array.data.ptr == place))

    x = made(3, 8, dtype=jnp.bfloat16)
    jax.block_until_ready(buffer_callback(look, jax.ShapeDtypeStruct.like(x))(x))
    assert seen == [((3, 8), "bfloat16", (16, 2), True)]

"""`attn_implementation="cuattn"`: models give what they give by default, or say why not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import Case, batched
from test_interop_torch import on, tensor

import cuattn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from cuattn.interop import transformers as hugging_face  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "initializer_range": 0.2,  # so that scores differ
    "pad_token_id": 0,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("Llama", {}),
    "gemma2": ("Gemma2", {"sliding_window": 16, "attn_logit_softcapping": 5.0}),
    "gpt_oss": ("GptOss", {"sliding_window": 16, **EXPERTS}),
}
PROMPT = 40


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    hugging_face.register()
    with torch.no_grad():
        yield
    hugging_face.configure(None)


class Model:
    """A small model with random weights: of ours in bfloat16, and the default in float32, too."""

    def __init__(self, device: Any, kind: str, **more: Any) -> None:
        name, fields = MODELS[kind]
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **fields, **more})
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(on(device))
        for module in made.modules():
            if hasattr(module, "sinks"):
                torch.nn.init.normal_(module.sinks, 1.0, 1.0)
        self.model = made.to(torch.bfloat16)

    def logits(self, implementation: str, dtype: Any, **inputs: Any) -> Any:
        self.model.set_attn_implementation(implementation)
        result = self.model.to(dtype)(**inputs, use_cache=False).logits.float()
        self.model.to(torch.bfloat16)
        return result

    def compare(self, seen: Any, rows: Any, **inputs: Any) -> None:
        """Demand an error against float32 that is at most twice that of the default attention."""
        exact = self.logits("eager", torch.float32, **inputs)
        plain = self.logits("eager", torch.bfloat16, **inputs)
        close(seen, plain, exact, rows)


def close(seen: Any, plain: Any, exact: Any, rows: Any) -> None:
    ours, theirs = ((x.float() - exact.float())[rows].abs().max().item() for x in (seen, plain))
    step = 2.0**-8 * exact[rows].abs().max().item()
    assert 0 < theirs < 0.2 * exact[rows].abs().max().item()
    assert ours <= 2 * theirs + step


def prompt(device: Any, padding: str) -> dict[str, Any]:
    """Two rows of tokens, the first of them shorter if there is padding."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, PROMPT), generator=random)
    kept = torch.ones_like(ids)
    if padding == "left":
        kept[0, :13] = 0
    elif padding == "right":
        kept[0, -13:] = 0
    return {"input_ids": (ids * kept).to(on(device)), "attention_mask": kept.to(on(device))}


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        ("llama", "none"),
        ("llama", "left"),
        ("llama", "right"),
        ("gemma2", "left"),
        ("gpt_oss", "left"),
    ],
)
def test_logits_are_those_of_the_default_attention(device: Any, kind: str, padding: str) -> None:
    model, inputs = Model(device, kind), prompt(device, padding)
    seen = model.logits("cuattn", torch.bfloat16, **inputs)
    model.compare(seen, inputs["attention_mask"].bool(), **inputs)
    assert torch.isfinite(seen).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_generates_as_over_the_whole_text(device: Any, kind: str, cache: str) -> None:
    """Left padding, a cache and steps of one token: the logits of one pass over everything."""
    model, inputs = Model(device, kind), prompt(device, "left")
    model.model.set_attn_implementation("cuattn")
    given = {} if cache == "dynamic" else {"cache_implementation": "static"}
    made = model.model.generate(
        **inputs,
        **given,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    kept = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    whole = {"input_ids": made.sequences, "attention_mask": kept}
    places = slice(PROMPT - 1, PROMPT + 3)
    seen = torch.zeros((*made.sequences.shape, 64), device=on(device))
    seen[:, places] = torch.stack(made.logits, 1).float()
    model.compare(seen, (slice(None), places), **whole)


def test_encoder_and_decoder_with_padding(device: Any) -> None:
    """Attention to all tokens, causal attention, and from one text to another of its length."""
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.2,
    )
    torch.manual_seed(0)
    model = transformers.BartModel(config).eval().to(on(device), torch.bfloat16)
    inputs = prompt(device, "right")
    inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)

    def hidden(implementation: str, dtype: Any) -> Any:
        model.set_attn_implementation(implementation)
        return model.to(dtype)(**inputs).last_hidden_state

    exact, plain = hidden("eager", torch.float32), hidden("eager", torch.bfloat16)
    close(hidden("cuattn", torch.bfloat16), plain, exact, ...)


def test_compiles_into_one_graph(device: Any) -> None:
    model = Model(device, "gemma2", num_hidden_layers=1).model
    inputs = prompt(device, "left")
    model.set_attn_implementation("cuattn")
    wanted = model(**inputs, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, use_cache=False).logits, wanted)
    inputs["attention_mask"] = inputs["attention_mask"].flip(0)
    wanted = model(**inputs, use_cache=False).logits
    assert torch.equal(compiled(**inputs, use_cache=False).logits, wanted)


# --- skipping ------------------------------------------------------------------------------------

STRUCTURED = Case(lengths=((150, 400), (150, 400)), data="structured", scale=0.25)


def heads_first(device: Any) -> list[Any]:
    """Q, K and V as a model has them, ``[batch, heads, tokens, dim]``."""
    arrays, _ = device.arguments(batched(STRUCTURED))
    return [tensor(device, x).transpose(1, 2).contiguous() for x in arrays]


def layer(number: int) -> Any:
    return SimpleNamespace(layer_idx=number, is_causal=True, config=SimpleNamespace())


def test_layers_skip_as_configured_and_count(device: Any) -> None:
    query, key, value = heads_first(device)
    hugging_face.configure({1: cuattn.SkipSoftmax(threshold=0.5)})
    dense, sparse = (
        hugging_face.attention(layer(n), query, key, value, None, scaling=0.25)[0] for n in (0, 1)
    )
    stats = cuattn.SkipStats()
    skip = cuattn.SkipSoftmax(threshold=0.5, stats=stats)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    alone = cuattn.prefill(q, k, v, causal=True, scale=0.25, skip_softmax=skip)
    assert torch.equal(sparse, tensor(device, alone)) and not torch.equal(sparse, dense)
    counted = hugging_face.counters()
    assert list(counted) == [1]
    assert counted[1] == (stats.visited, stats.skipped, 0)
    assert 0 < counted[1].rate == stats.rate < 1
    hugging_face.configure(None)
    assert torch.equal(
        hugging_face.attention(layer(1), query, key, value, None, scaling=0.25)[0], dense
    )
    assert hugging_face.counters() == {}


def test_padded_rows_skip_as_each_alone(device: Any) -> None:
    query, key, value = heads_first(device)
    kept = torch.ones((2, 400), dtype=torch.bool, device=on(device))
    kept[0, :91] = False
    ends = hugging_face.mask(2, 150, 400, 250, attention_mask=kept, device=on(device))
    live = torch.tensor([0.5, 0.45], device=on(device))
    hugging_face.configure(cuattn.SkipSoftmax(threshold=live))
    seen, _ = hugging_face.attention(layer(0), query, key, value, ends, scaling=0.25)
    skipped = 0
    for row, first in enumerate((91, 0)):
        stats = cuattn.SkipStats()
        skip = cuattn.SkipSoftmax(threshold=float(live[row]), stats=stats)
        q, k, v = (
            x[row : row + 1].transpose(1, 2)[:, n:]
            for x, n in ((query, 0), (key, first), (value, first))
        )
        alone = cuattn.prefill(q, k, v, causal=True, scale=0.25, skip_softmax=skip)
        assert torch.equal(seen[row], tensor(device, alone)[0])
        assert stats.skipped > 0
        skipped += stats.skipped
    assert hugging_face.counters()[0].skipped == skipped


# --- masks ---------------------------------------------------------------------------------------


def pairs(ends: Any, batch: int, q_length: int, kv_length: int) -> Any:
    """The pairs of queries and keys that the pieces of rows stand for, bottom-right causal."""
    seen = np.zeros((batch, q_length, kv_length), bool)
    queries, keys, rows = ends[0, 0].numpy()
    causal = (len(queries) - 1) // batch == 4
    begin_q = begin_k = 0
    for end_q, key, row in zip(queries[1:], keys[1:], rows[1:], strict=True):
        end_k = key + row * kv_length
        here = slice(begin_q - row * q_length, end_q - row * q_length)
        there = slice(begin_k - row * kv_length, end_k - row * kv_length)
        if end_q > begin_q and end_k > begin_k:
            q_len, kv_len = end_q - begin_q, end_k - begin_k
            block = np.ones((q_len, kv_len), bool)
            seen[row, here, there] = np.tril(block, kv_len - q_len) if causal else block
        begin_q, begin_k = end_q, end_k
    return seen


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("static", [0, 9], ids=["dynamic", "static"])
@pytest.mark.parametrize("offset", [0, 5], ids=["prefill", "later"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_pieces_are_the_pairs_of_the_default_mask(
    causal: bool, static: int, offset: int, side: str
) -> None:
    q_length, lengths = 6, [3, 11, 0, 8]
    seen_so_far = offset + q_length
    kept = np.ones((4, seen_so_far), bool)
    for row, length in zip(kept, lengths, strict=True):
        row[length:] = side != "right"
        row[: max(seen_so_far - length, 0)] &= side != "left"
    sizes = {"batch_size": 4, "q_length": q_length, "kv_length": seen_so_far + static}
    function = masking_utils.bidirectional_mask_function
    options: dict[str, Any] = {
        "q_offset": torch.tensor(offset) if static else offset,
        "mask_function": masking_utils.causal_mask_function if causal else function,
        "attention_mask": torch.from_numpy(kept),
        "allow_is_causal_skip": False,
        "config": SimpleNamespace(),
    }
    wanted = masking_utils.sdpa_mask(**sizes, **options)[:, 0].numpy()
    ends = hugging_face.mask(**sizes, **options)
    if ends is None:
        assert side == "none" and not static and wanted[:, -1].all()
        return
    seen = pairs(ends, 4, q_length, sizes["kv_length"])
    real = np.ones((4, q_length), bool) if not causal else kept[:, offset:]
    np.testing.assert_array_equal(seen[real], wanted[real])
    assert not seen[~real].any()  # padding sees nothing and gives zeros


WINDOW = SimpleNamespace(sliding_window=8)
CHUNKS = SimpleNamespace(sliding_window=8, attention_chunk_size=8)


def packed_pattern(function: Any, sequences: Any) -> Any:
    """What Transformers makes of a pattern for packed sequences, in whatever version."""
    utils = masking_utils
    if hasattr(utils, "packed_sequence_compatibility_function"):
        return utils.packed_sequence_compatibility_function(function, sequences, sequences)
    return utils.and_masks(function, utils.packed_sequence_mask_function(sequences))


def patterns() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Mask functions as Transformers composes them, and what it hands over beside them."""
    zeros = torch.zeros((1, 20), dtype=torch.int64)
    sliding = masking_utils.sliding_window_causal_mask_function(8)
    causal = masking_utils.causal_mask_function
    packed = packed_pattern(sliding, zeros)
    beside = {"local_size": 8, "config": WINDOW, "allow_is_causal_skip": True}
    never = {**beside, "allow_is_causal_skip": False}
    either = masking_utils.or_masks(causal, sliding)
    around = masking_utils.sliding_window_bidirectional_mask_function(8)
    return {
        "sliding": (sliding, beside),
        "packed": (packed, never),
        "packed without a window": (packed, {**never, "local_size": None}),
        "chunks": (
            masking_utils.chunked_causal_mask_function(8, zeros),
            {**beside, "config": CHUNKS},
        ),
        "mapped": (masking_utils.and_masks(causal, sliding), {**beside, "use_vmap": True}),
        "a window of its own": (sliding, {**beside, "local_size": 7}),
        "either": (either, beside),
        "around": (around, {**never, "allow_is_bidirectional_skip": True}),
    }


@pytest.mark.parametrize(
    "form",
    [
        *("packed", "packed without a window", "chunks", "mapped", "a window of its own"),
        *("either", "around"),
    ],
)
def test_masks_of_other_forms_are_refused(form: str) -> None:
    function, beside = patterns()[form]
    with pytest.raises(ValueError, match=r"the model wants a mask made by .*; wanted causal"):
        hugging_face.mask(1, 20, 20, mask_function=function, **beside)


def test_windows_are_left_to_the_layers() -> None:
    function, beside = patterns()["sliding"]
    assert hugging_face.mask(1, 20, 20, mask_function=function, **beside) is None
    kept = torch.ones((1, 20), dtype=torch.bool)
    for padding in (kept, kept.cumsum(1) > 4):
        beside["allow_is_causal_skip"] = False  # in a static cache
        ends = hugging_face.mask(1, 6, 20, 14, 0, function, padding, **beside)
        assert (ends is None) == bool(padding.all())
    function, beside = patterns()["around"]
    assert hugging_face.mask(1, 8, 8, mask_function=function, **beside) is None  # hides nothing


def test_heads_are_read_where_the_cache_holds_them() -> None:
    from cuattn.interop._torch_padded import _end_to_end

    cache = torch.arange(2 * 3 * 5 * 8).view(2, 3, 5, 8)  # [batch, heads, tokens, dim]
    flat, step = _end_to_end(cache.transpose(1, 2))
    assert flat.data_ptr() == cache.data_ptr()
    for row in range(2):
        assert torch.equal(flat[row * step : row * step + 5], cache[row].transpose(0, 1))


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_in_one_sentence(device: Any) -> None:
    model, inputs = Model(device, "llama", attention_dropout=0.1).model, prompt(device, "none")
    model.set_attn_implementation("cuattn")
    ids, kept = inputs["input_ids"], inputs["attention_mask"].clone()
    kept[:, 7] = 0
    square = torch.ones((2, 1, PROMPT, PROMPT), dtype=torch.bool, device=ids.device)
    packed = torch.arange(PROMPT // 2, device=ids.device).repeat(2)[None]
    for sentence, given in (
        (
            "output_attentions is True; wanted attn_implementation='eager'",
            {"output_attentions": True},
        ),
        ("padding between tokens; wanted it before or behind", {"attention_mask": kept}),
        ("wanted the model to be given a mask of padding", {"attention_mask": square}),
        ("wants a mask made by and_masks", {"position_ids": packed, "use_cache": False}),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(ids, **given)
    with pytest.raises(ValueError, match=r"dropout is 0\.1; wanted 0"):
        model.train()(ids)
    with pytest.raises(TypeError, match=r"query is torch\.float32; wanted a model loaded with"):
        model.eval().float()(ids)


def test_single_layers_refuse_what_they_cannot_do(device: Any) -> None:
    x = torch.zeros((1, 2, 40, 32), dtype=torch.bfloat16, device=on(device))
    for sentence, module, given in (
        ("position_bias is given; wanted None", layer(0), {"position_bias": x}),
        ("continuous batching", layer(0), {"cache": x}),
        (
            "sliding_window is 16 in a layer that is not causal",
            layer(0),
            {"is_causal": False, "sliding_window": 16},
        ),
        (
            "gave no sliding_window",
            SimpleNamespace(layer_idx=0, config=SimpleNamespace(layer_types=["sliding_attention"])),
            {},
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            hugging_face.attention(module, x, x, x, None, **given)


def test_gradients_are_refused(device: Any) -> None:
    model = Model(device, "llama").model
    model.set_attn_implementation("cuattn")
    wanted = r"query requires grad; wanted torch\.no_grad"
    with torch.enable_grad(), pytest.raises(ValueError, match=wanted):
        model(prompt(device, "none")["input_ids"])


def test_configure_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="skip_softmax of 3 is a float; wanted a SkipSoftmax"):
        hugging_face.configure({3: 0.1})  # type: ignore[dict-item]
    counted = cuattn.SkipSoftmax(threshold=0.1, stats=cuattn.SkipStats())
    with pytest.raises(ValueError, match="skip_softmax of every layer has stats; wanted None"):
        hugging_face.register(skip_softmax=counted)
    certified = cuattn.SkipSoftmax(threshold=0.1, certificate=True)
    with pytest.raises(ValueError, match="skip_softmax of 3 has certificate=True; wanted False"):
        hugging_face.configure({3: certified})

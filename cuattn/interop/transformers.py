"""``attn_implementation="cuattn"`` for Hugging Face Transformers.

Prefill and decode over dense caches, dynamic or static; grouped heads, sliding windows, soft caps,
sinks, padding on either side, encoders. Keys and values are read where the cache holds them. What
cannot be done is refused in one sentence: training, `output_attentions`, masks of other forms.

Skip-softmax can be switched on for all layers or some, and says afterwards what it left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

import cuattn

from . import _torch_padded
from ._torch_arguments import SkipStats, check_tensors, options
from .torch import prefill

__all__ = ["Counts", "configure", "counters", "register"]

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 6):
    raise ImportError(f"transformers is {transformers.__version__}; wanted 5.6 or later")

NAME = "cuattn"

_HOLES = (
    "attention_mask has padding between tokens; wanted it before or behind them (for generation: "
    "before, with padding_side='left')"
)

Skips = cuattn.SkipSoftmax | Mapping[int, cuattn.SkipSoftmax] | None


class Counts(NamedTuple):
    """Votes of a layer since `configure`."""

    visited: int
    skipped: int
    ineligible: int

    @property
    def rate(self) -> float:
        """Skipped over visited; 0 when nothing was visited."""
        return self.skipped / self.visited if self.visited else 0.0


class _Settings:
    """What `configure` was told, and what was counted since."""

    def __init__(self) -> None:
        self.everywhere: cuattn.SkipSoftmax | None = None
        self.layers: dict[int, cuattn.SkipSoftmax] = {}
        self.stats: dict[tuple[int | None, int, int, str], SkipStats] = {}


_settings = _Settings()


def register(*, skip_softmax: Skips = None) -> None:
    """Let models be made with ``attn_implementation="cuattn"``.

    Parameters
    ----------
    skip_softmax : SkipSoftmax, or mapping of layers to them, optional
        As in `configure`. Default: compute every tile.

    Notes
    -----
    Models must be in bfloat16 or float16 and run under ``torch.no_grad()`` or
    ``torch.inference_mode()``, as `generate` does. A batch of unequal lengths is padded on the left
    for generation; encoders may pad on either side. Causal layers give zeros for padding.
    Under `torch.compile`, a model without a cache must be given its attention_mask: without one
    Transformers cannot tell a text from several packed in one.

    Examples
    --------
    >>> import cuattn.interop.transformers                                 # doctest: +SKIP
    >>> cuattn.interop.transformers.register()                             # doctest: +SKIP
    >>> from transformers import AutoModelForCausalLM                      # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained(                      # doctest: +SKIP
    ...     name, dtype="bfloat16", attn_implementation="cuattn")
    """
    configure(skip_softmax)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def configure(skip_softmax: Skips) -> None:
    """Switch skip-softmax on or off, and set all counters to 0.

    Parameters
    ----------
    skip_softmax : SkipSoftmax, mapping of int to SkipSoftmax, or None
        For every layer, or by the index of layers, the others being dense. Its `stats` must be
        None: counters are made for each layer; and `certificate` False. In force for every model,
        from the next call on.
    """
    layers = skip_softmax if isinstance(skip_softmax, Mapping) else {}
    everywhere = None if isinstance(skip_softmax, Mapping) else skip_softmax
    for layer, skip in (*layers.items(), ("every layer", everywhere)):
        if skip is None:
            continue
        if not isinstance(skip, cuattn.SkipSoftmax):
            raise TypeError(
                f"skip_softmax of {layer} is a {type(skip).__name__}; wanted a SkipSoftmax"
            )
        if skip.stats is not None:
            raise ValueError(
                f"skip_softmax of {layer} has stats; wanted None, since `counters` gives those of "
                "each layer"
            )
        if skip.certificate:
            raise ValueError(
                f"skip_softmax of {layer} has certificate=True; wanted False, since a layer "
                "returns its output only"
            )
    _settings.everywhere = everywhere
    _settings.layers = dict(layers)
    _settings.stats = {}


def counters() -> dict[int | None, Counts]:
    """Return what each layer skipped since `configure`, by its index; waits for the device."""
    sums: dict[int | None, Counts] = {}
    for (layer, *_), stats in _settings.stats.items():
        seen = (stats.visited, stats.skipped, stats.ineligible)
        before = sums.get(layer, Counts(0, 0, 0))
        sums[layer] = Counts(*(a + b for a, b in zip(before, seen, strict=True)))
    return dict(sorted(sums.items(), key=lambda item: -1 if item[0] is None else item[0]))


# --- attention -----------------------------------------------------------------------------------

_UNABLE = {
    "position_bias": "a bias of positions",
    "cache": "continuous batching",
    "cu_seq_lens_q": "packed sequences",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "sinks": "sinks under this name",
}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a layer; what Transformers calls.

    Parameters
    ----------
    query, key, value : Tensor, ``[batch, heads, tokens, head_dim]``
    attention_mask : Tensor, optional
        What `mask` made.
    """
    _refuse(module, query, dropout, sliding_window, more)
    check_tensors(query=query, key=key, value=value)
    batch, heads = query.shape[:2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None:
        causal = _is_causal(attention_mask, batch)
    window = -1 if sliding_window is None else sliding_window - 1
    if window >= 0 and not causal:
        if key.shape[2] > sliding_window:
            raise ValueError(
                f"sliding_window is {sliding_window} in a layer that is not causal, over "
                f"{key.shape[2]} keys; wanted causal attention or no more keys"
            )
        window = -1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    keywords: dict[str, Any] = {
        "window_left": window,
        "scale": scaling,
        "soft_cap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.detach().float(),
    }
    skip = _skip(module, batch, heads, query)
    if attention_mask is None:
        return prefill(q, k, v, causal=causal, skip_softmax=skip, **keywords), None
    given = options(
        q, batch, out_scale=None, skip=skip, return_lse=False, out_dtype=None, **keywords
    )
    return torch.ops.cuattn.prefill_padded(q, k, v, attention_mask, causal, *given), None


def _refuse(
    module: torch.nn.Module,
    query: Tensor,
    dropout: float,
    sliding_window: int | None,
    more: Mapping[str, Any],
) -> None:
    """Raise ValueError for what would change the result and cannot be done."""
    if dropout:
        raise ValueError(f"dropout is {dropout}; wanted 0, so call the model's eval()")
    if more.get("output_attentions"):
        raise ValueError("output_attentions is True; wanted attn_implementation='eager' for it")
    for name, what in _UNABLE.items():
        if more.get(name) is not None:
            raise ValueError(f"{name} is given; wanted None, since cuattn has not {what}")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"query is {query.dtype}; wanted a model loaded with dtype=torch.bfloat16 or float16"
        )
    types = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if types and layer is not None and sliding_window is None and layer < len(types):
        kind = types[layer]
        if kind in ("sliding_attention", "chunked_attention"):
            raise ValueError(
                f"layer {layer} is of the kind {kind!r} and gave no sliding_window; wanted one"
            )


def _is_causal(attention_mask: Tensor, batch: int) -> bool:
    """Tell from its size what kind of mask this is."""
    shape = attention_mask.shape
    if attention_mask.dtype == torch.int32 and len(shape) == 4 and shape[:3] == (1, 1, 3):
        if shape[3] == batch * _torch_padded.CAUSAL_PIECES + 1:
            return True
        if shape[3] == batch * _torch_padded.FULL_PIECES + 1:
            return False
    raise ValueError(
        f"attention_mask is {attention_mask.dtype} of shape {tuple(shape)}; wanted the model to "
        "be given a mask of padding [batch, tokens], since masks of all pairs are not supported"
    )


def _skip(
    module: torch.nn.Module, batch: int, heads: int, query: Tensor
) -> cuattn.SkipSoftmax | None:
    """Return the layer's option with its counters."""
    layer = getattr(module, "layer_idx", None)
    skip = (
        _settings.everywhere if layer is None else _settings.layers.get(layer, _settings.everywhere)
    )
    if skip is None:
        return None
    key = (layer, batch, heads, str(query.device))
    stats = _settings.stats.get(key)
    if stats is None:
        stats = _settings.stats[key] = SkipStats()
    return replace(skip, stats=stats)


# --- masks ---------------------------------------------------------------------------------------


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = "cpu",
    **more: Any,
) -> Tensor | None:
    """Make a mask of lengths rather than of pairs; what Transformers calls once a forward.

    Parameters
    ----------
    q_offset, kv_offset : int or Tensor
        Positions of the first query and of the first key; a tensor for a static cache.
    attention_mask : Tensor, bool ``[batch, tokens]``, optional
        Which tokens are no padding.

    Returns
    -------
    Tensor or None
        None when every query has all its keys and every key its query; else the ends of the pieces
        of each row, see `_torch_padded.pieces`.
    """
    if attention_mask is not None or kv_length != q_length:  # a text, not several packed in one
        more["allow_is_causal_skip"] = True
    causal = _is_causal_pattern(mask_function, kv_length, local_size, more)
    limit = q_offset + q_length - kv_offset if causal else kv_length  # keys written so far
    if attention_mask is None:
        if isinstance(limit, int) and limit == kv_length:
            return None
        end = torch.as_tensor(limit, device=device).expand(batch_size)
        first = torch.zeros_like(end)
    else:
        first, end, none_left_out, in_one_piece = _tokens(attention_mask, kv_offset, kv_length)
        if torch.compiler.is_compiling():
            torch._assert_async(in_one_piece, _HOLES)
        else:
            complete, right = torch.stack((none_left_out, in_one_piece)).tolist()
            if not right:
                raise ValueError(_HOLES)
            if complete and isinstance(limit, int) and limit == kv_length:
                return None
    if not causal:
        return _torch_padded.pieces(first, end, None, None, q_length)
    end = torch.minimum(end, torch.as_tensor(limit, device=device))
    first = torch.minimum(first, end)
    q_first = (first + kv_offset - q_offset).clamp(0, q_length)
    q_end = torch.maximum((end + kv_offset - q_offset).clamp(0, q_length), q_first)
    return _torch_padded.pieces(first, end, q_first, q_end, q_length)


def _tokens(
    attention_mask: Tensor, kv_offset: int, kv_length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where tokens begin and end in each row of a mask of padding, ``[batch]`` each.

    And whether that is everything, and whether there is no padding between them.
    """
    kept = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.int64)
    kept = torch.nn.functional.pad(kept, (0, kv_length - kept.shape[1]))  # of a static cache
    count, first = kept.sum(1), kept.argmax(1)
    places = torch.arange(kv_length, device=kept.device)
    straight = (kept == 0) | (kept.cumsum(1) - 1 + first[:, None] == places)
    return first, first + count, (kept == 1).all(), straight.all()


def _is_causal_pattern(
    mask_function: Callable[..., Any],
    kv_length: int,
    local_size: int | None,
    more: Mapping[str, Any],
) -> bool:
    """Say whether a mask is causal; raise ValueError for what is neither that nor full.

    NOTE: what a composed function is made of cannot be seen while it is being compiled, so the
    arguments beside it must tell: a sliding window is that of the config, packed sequences do not
    allow to leave the mask out, and what a model adds by itself is mapped, or is no conjunction.
    """
    if mask_function is causal_mask_function:
        return True
    if mask_function is bidirectional_mask_function:
        return False
    config = more.get("config")
    composed = mask_function.__qualname__ == "and_masks.<locals>.and_mask"
    if composed and local_size is not None and not more.get("use_vmap"):
        sliding = local_size == getattr(config, "sliding_window", None)
        chunked = getattr(config, "attention_chunk_size", None) is not None
        if "allow_is_bidirectional_skip" in more:
            if kv_length <= local_size:
                return False  # a window that hides nothing
        elif sliding and not chunked and more.get("allow_is_causal_skip"):
            return True  # the window itself comes with each layer
    raise ValueError(
        f"the model wants a mask made by {mask_function.__qualname__}; wanted causal "
        "attention, with a sliding window or not, or attention to all tokens, so take another "
        "attn_implementation"
    )

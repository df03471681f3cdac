"""Random Llama-shaped models, built under `zero.Init`, so that no rank ever holds a whole one."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import transformers

SHAPES = {
    # name: hidden size, layers, feed-forward size, heads, vocabulary
    "22m": (384, 6, 1024, 6, 16_384),
    "165m": (768, 16, 2048, 12, 32_000),
    "1.1b": (2048, 22, 5632, 32, 32_000),
}


def config_of(size: str) -> transformers.LlamaConfig:
    """One of `SHAPES`, or "HIDDENxLAYERS" with a small vocabulary, as for "2560x30"."""
    if size in SHAPES:
        hidden, layers, inner, heads, vocabulary = SHAPES[size]
    else:
        hidden, layers = map(int, size.split("x"))
        inner, heads, vocabulary = hidden * 11 // 4, hidden // 64, 4096
    return transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        use_cache=False,
    )


def build(size: str, ds_config: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        return transformers.LlamaForCausalLM(config_of(size))


def elements(model: torch.nn.Module) -> int:
    return sum(p.ds_numel for p in model.parameters())


def batch_of(seed: int, device: Any, rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}

"""Tiny models and data, the same on every rank and in every run.

Odd hidden sizes, so that flat shards are uneven; parameters of one element, so that some ranks hold none of them; no parameter
that starts at zero, so that relative differences mean something for every one of them. Mostly one block: half of the time of
a suite of tiny engines goes into the hooks around modules.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]

VOCABULARY = 37
MICRO_BATCH_SIZE = 2
CLASSES = 3


@dataclass(frozen=True)
class Family:
    """One architecture, and what Child-Tuning has to know about it."""

    build: Callable[[float], nn.Module]
    """From a dropout rate; weights from torch's global generator."""

    blocks: tuple[str, ...]
    """Prefixes of the parameters inside its repeated blocks: what ChildTuning-D masks by default."""

    batch: Callable[[torch.Generator], Batch] = field(repr=False)
    """A micro-batch, to be passed as `model(**batch)`."""


def build(family: str, *, dropout: float = 0.0) -> nn.Module:
    """The model of a family, in fp32 and training mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(family.encode()))
        model = FAMILIES[family].build(dropout)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def batches(family: str, count: int, *, seed: int = 0) -> list[Batch]:
    """`count` different micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [FAMILIES[family].batch(generator) for _ in range(count)]


def deal(items: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """One rank's share of a list, dealt like cards."""
    return items[rank::world_size]


def block_parameters(family: str, model: nn.Module) -> list[str]:
    """Trainable parameters inside the repeated blocks."""
    return [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(FAMILIES[family].blocks)]


# ---------------------------------------------------------------- transformers


def _gpt2(dropout: float, blocks: int = 1) -> nn.Module:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=11,
        n_embd=9,
        n_layer=blocks,
        n_head=3,
        n_inner=17,
        bos_token_id=0,
        eos_token_id=0,
        **rates,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(dropout: float, blocks: int = 1) -> nn.Module:
    """No biases, hence no gradient that is zero in exact arithmetic."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=9,
        intermediate_size=13,
        num_hidden_layers=blocks,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
    )
    return transformers.LlamaForCausalLM(config)


def _bert(dropout: float) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=9,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=13,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def _t5(dropout: float) -> nn.Module:
    """Encoder, decoder and head share one embedding."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=9,
        d_kv=3,
        d_ff=13,
        num_layers=1,
        num_heads=3,
        dropout_rate=dropout,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _tokens(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (MICRO_BATCH_SIZE, length), generator=generator)


def _causal_batch(generator: torch.Generator) -> Batch:
    tokens = _tokens(generator, 8)
    return {"input_ids": tokens, "labels": tokens}


def _classified_batch(generator: torch.Generator) -> Batch:
    labels = torch.randint(0, CLASSES, (MICRO_BATCH_SIZE,), generator=generator)
    return {"input_ids": _tokens(generator, 8), "labels": labels}


def _translated_batch(generator: torch.Generator) -> Batch:
    return {"input_ids": _tokens(generator, 8), "labels": _tokens(generator, 5)}


# ---------------------------------------------------------------- odd shapes


class OddBlock(nn.Module):
    """Five parameters: a matrix, a vector of three, two of one element, and a frozen one."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.mix = nn.Linear(width, 3)
        self.frozen = nn.Linear(width, width, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.back = nn.Linear(3, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(x) * self.gain)
        return x + self.scale * self.dropout(self.back(hidden)) + 0.1 * self.frozen(x)


class OddModel(nn.Module):
    """Regression with frozen, tied, tiny and one-element parameters."""

    def __init__(self, dropout: float = 0.0, width: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.frozen_input = nn.Linear(5, 5)
        self.frozen_input.requires_grad_(False)
        self.blocks = nn.ModuleList([OddBlock(width, dropout) for _ in range(3)])
        self.blocks[2].mix.weight = self.blocks[0].mix.weight  # tied across blocks
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(self.frozen_input(x.to(self.head.weight.dtype)))
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.mse_loss(self.head(hidden).squeeze(-1).float(), y.float())


def _regression_batch(generator: torch.Generator) -> Batch:
    x = torch.randn(MICRO_BATCH_SIZE, 5, generator=generator)
    return {"x": x, "y": x.sum(-1) + torch.randn(MICRO_BATCH_SIZE, generator=generator)}


# ---------------------------------------------------------------- exact arithmetic


class IntegerBlock(nn.Module):
    """Two parameters whose gradients the batch dictates."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, 11))
        self.bias = nn.Parameter(torch.zeros(11))

    def forward(self, weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
        return (self.weight * weight_gradient).sum() + (self.bias * bias_gradient).sum()


class IntegerModel(nn.Module):
    """Linear in its parameters, so that a batch of small integers is its gradient.

    Gradients, their squares and sums of those are exact in fp32 and in bf16 whatever the order of summation, hence so
    are Fisher information and masks. Most scores are equal to many others, a third of them to zero.
    """

    ROWS = (3, 4) * 6
    """Of each block: twelve blocks, as blocks.10 comes before blocks.2 in name order and after it in module order."""

    SIZES = (5, *(size for rows in ROWS for size in (rows * 11, 11)))
    """Elements of each parameter, in the order of `named_parameters`; at ZeRO-3 the parameters themselves are empty."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(5))
        self.blocks = nn.ModuleList([IntegerBlock(rows) for rows in self.ROWS])

    def forward(self, gradients: Tensor) -> Tensor:
        """`gradients`: (1, sum(SIZES)), the gradients of all parameters, flat."""
        head, *parts = gradients[0].to(self.head.dtype).split(self.SIZES)
        loss = (self.head * head).sum()
        for block, weight, bias in zip(self.blocks, parts[::2], parts[1::2], strict=True):
            loss = loss + block(weight.view(-1, 11), bias)
        return loss


def _integer_batch(generator: torch.Generator) -> Batch:
    gradients = torch.randint(-2, 3, (1, sum(IntegerModel.SIZES)), generator=generator).float()
    gradients[:, ::3] = 0  # the same third in every batch
    return {"gradients": gradients}


FAMILIES = {
    "gpt2": Family(_gpt2, ("transformer.h.",), _causal_batch),
    "gpt2-2-blocks": Family(functools.partial(_gpt2, blocks=2), ("transformer.h.",), _causal_batch),
    "llama": Family(_llama, ("model.layers.",), _causal_batch),
    "llama-2-blocks": Family(functools.partial(_llama, blocks=2), ("model.layers.",), _causal_batch),
    "bert": Family(_bert, ("bert.encoder.layer.",), _classified_batch),
    "t5": Family(_t5, ("encoder.block.", "decoder.block."), _translated_batch),
    "odd": Family(OddModel, ("blocks.",), _regression_batch),
    "integer": Family(IntegerModel, ("blocks.",), _integer_batch),
}

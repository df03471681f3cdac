"""The scores of launch/finetune.py: a forward pass over all rows, shared between ranks, and the task's metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from deepspeed import comm as dist
from text_data import Batch, Collate, to_device
from torch import Tensor
from tqdm import tqdm

Logits = dict[int, Tensor]
"""By row number: [labels, vocabulary], in the model's dtype."""


@torch.no_grad()
def forwards(engine: Any, rows: Dataset, collate: Collate, batch_size: int) -> Iterator[tuple[list[int], Batch, Any]]:
    """(row numbers, batch, output) for this rank's rows: each row once over all ranks, long ones first, little padding.

    Under ZeRO-3 every forward is a collective, so a rank that has no rows left runs the shortest row and yields nothing.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_length = np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable").tolist()
    mine = by_length[rank::world_size]
    engine.eval()
    # Rank 0 has the most rows, or as many as the others.
    for start in tqdm(
        range(0, len(by_length[::world_size]), batch_size), desc="Evaluating", disable=rank != 0, leave=False
    ):
        numbers = mine[start : start + batch_size]
        batch = to_device(collate([rows[i] for i in numbers or by_length[-1:]]), engine)
        output = engine(**batch)
        if numbers:
            yield numbers, batch, output


def evaluate(
    engine: Any, task: str, rows: Dataset, collate: Collate, batch_size: int, base: Logits | None = None
) -> dict[str, float]:
    """The task's metrics over every row of all ranks, the same on every rank.

    Args:
        base: `label_logits` of another model, for a language model's KL divergence to it.
    """
    if task == "causal-lm":
        return perplexity(engine, rows, collate, batch_size, base)
    mine = [(n, out.logits.float().cpu().numpy()) for n, _, out in forwards(engine, rows, collate, batch_size)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    numbers, logits = zip(*itertools.chain.from_iterable(everyone), strict=True)
    order = np.argsort(np.concatenate(numbers))
    logits = np.concatenate(logits)[order]
    labels = np.asarray(rows["labels"])
    return correlations(labels, logits[:, 0]) if task == "regression" else class_scores(labels, logits.argmax(axis=1))


def class_scores(labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    binary = int(max(labels.max(), predicted.max())) <= 1
    name, average = ("f1", "binary") if binary else ("f1_macro", "macro")
    return {
        "accuracy": float((labels == predicted).mean()),
        name: float(f1_score(labels, predicted, average=average)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def correlations(labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    return {
        "pearson": float(pearsonr(labels, predicted)[0]),
        "spearman": float(spearmanr(labels, predicted)[0]),
        "mse": float(np.square(labels - predicted).mean()),
    }


def perplexity(
    engine: Any, rows: Dataset, collate: Collate, batch_size: int, base: Logits | None = None
) -> dict[str, float]:
    total = torch.zeros(3, dtype=torch.float64)  # nats, predicted tokens, nats of KL
    for numbers, batch, output in forwards(engine, rows, collate, batch_size):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        kl = 0.0 if base is None else divergence(torch.cat([base[n] for n in numbers]), at_labels(batch, output))
        total += torch.tensor([output.loss.item() * tokens, tokens, kl], dtype=torch.float64)
    total = total.to(engine.device)
    dist.all_reduce(total)
    loss = float(total[0] / total[1])
    scores = {"perplexity": float(np.exp(loss)), "loss": loss}
    return scores if base is None else scores | {"kl": float(total[2] / total[1])}


def label_logits(engine: Any, rows: Dataset, collate: Collate, batch_size: int) -> Logits:
    """This rank's rows' logits at the tokens that are labels."""
    of: Logits = {}
    for numbers, batch, output in forwards(engine, rows, collate, batch_size):
        counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
        of |= zip(numbers, at_labels(batch, output).split(counts), strict=True)
    return of


def at_labels(batch: Batch, output: Any) -> Tensor:
    """[labels, vocabulary]: the logits that predict a label, row after row."""
    logits: Tensor = output.logits[:, :-1][batch["labels"][:, 1:] != -100]
    return logits


def divergence(base: Tensor, logits: Tensor) -> float:
    """KL(base || logits) in nats, summed over the rows of [labels, vocabulary]."""
    kl = 0.0
    for one, other in zip(base.split(256), logits.split(256), strict=True):  # in fp32 a vocabulary is large
        was, now = one.float().log_softmax(-1), other.float().log_softmax(-1)
        kl += float((was.exp() * (was - now)).sum())
    return kl

"""Scores for a child that learns a task and spares what the model knows of general text.

[Note: contrast]
To second order, the loss on general text rises by 1/2 * sum of F_general,i * d_i**2 over the elements i that move by d_i (the
diagonal of its Hessian is about the Fisher information F_general, and its gradient is about zero where training on general text has
ended). Adam divides each element's step by the size of its gradient, so inside a child all |d_i| are of one size: what a child
of k elements costs is about the sum of its F_general,i, and what it learns is about the sum of |g_task,i|, the root of F_task,i.
So take the elements that learn most for what they cost:

    score_i = F_task,i / (F_general,i / m + 0.1),    m = the mean of F_general over all eligible elements

which orders like F_task / (F_general + eps) with eps = m / 10: without it, elements that general text hardly uses would come first
however little the task has to teach them. Dividing by m keeps scores finite and makes the constant free of the loss's scale.

Memory: the general pass keeps two bytes an element (e8m8) while the task's pass adds its own; the scores then take the place of the
task's sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from ds_childtune.ranks import device, sum_over_ranks
from ds_childtune.selection.scores import Scores

_EPS = 0.1
"""Of F_general's mean."""


def check_against(selector: str, against: Iterable[Any] | None) -> None:
    """
    Raises:
        ValueError: for general batches without selector `contrast`, or the other way round.
    """
    if selector == "contrast" and against is None:
        raise ValueError(
            'select: expected general batches for selector "contrast", got None. Remedy: pass'
            " select(task_batches, against=general_batches), the latter of text that the model is to keep."
        )
    if selector != "contrast" and against is not None:
        raise ValueError(
            f'select: expected selector "contrast" with general batches, got "{selector}". Remedy: set "selector": "contrast" in the'
            " child_tuning block, or leave `against` out."
        )


def contrast(task: list[list[Scores]], general: list[list[Scores]], eligible: int) -> None:
    """Turn the task's sums of Fisher information into scores, in place; the general sums are freed. A collective.

    Args:
        task: for each flat shard, its eligible fragments' sums.
        general: the same fragments, over general batches.
        eligible: elements of all eligible parameters, each counted once.

    Raises:
        ValueError: on every rank, when the general sums are all zero, NaN or infinite.
    """
    total = torch.zeros(1, dtype=torch.float64, device=device())
    for scores in itertools.chain(*general):
        if scores.counted:
            for tile in scores.float_tiles():
                total += tile.sum(dtype=torch.float64).to(total.device)
    sum_over_ranks(total)
    mean = float(total) / eligible
    if not 0 < mean < float("inf"):
        raise ValueError(
            'select: expected general batches with a finite gradient for selector "contrast", got a mean Fisher information of'
            f" {mean}."
            " Remedy: look at the batches of `against` and at their labels."
        )
    for of_task, of_general in zip(task, general, strict=True):
        for numerator, divisor in zip(of_task, of_general, strict=True):
            numerator.divide_(divisor, mean, _EPS)
        of_general.clear()

"""R-Drop and learning rates by layer in launch/finetune.py, with a child."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.support import finetune_jobs
from tests.support.finetune_jobs import ROOT, make_inputs, options
from tests.support.ranks import RankPool

sys.path.insert(0, str(ROOT / "launch"))
import techniques  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("techniques")
    make_inputs(folder)
    return folder


def test_r_drop_by_hand() -> None:
    """Two outputs of each of three examples; torch's own KL divergence in both directions."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def engine(**batch: torch.Tensor) -> Any:
        seen.append(batch["input_ids"])
        return SimpleNamespace(loss=torch.tensor(2.0), logits=logits)

    loss = techniques.r_drop_loss(engine, {"input_ids": torch.arange(3)}, weight=0.5)
    assert seen[0].tolist() == [0, 1, 2, 0, 1, 2]
    one, other = logits[:3].log_softmax(-1), logits[3:].log_softmax(-1)
    both = [
        torch.nn.functional.kl_div(a, b, reduction="batchmean", log_target=True)
        for a, b in ((one, other), (other, one))
    ]
    assert min(both) > 0.1, "vacuous: the outputs are the same"
    assert float(loss) == pytest.approx(2 + 0.5 * float(sum(both)) / 2)


def test_rates_by_hand() -> None:
    names = [
        "embeddings.word",
        "encoder.layer.0.a",
        "encoder.layer.0.b",
        "encoder.layer.1.a",
        "pooler",
        "head.0.weight",
    ]
    factors = techniques.rate_factors(names, 0.5)
    assert list(factors.values()) == [0.125, 0.25, 0.25, 0.5, 1, 1]
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    first, second = list(parameters.values())[:3], list(parameters.values())[3:]
    groups = [{"params": first, "weight_decay": 0.1}, {"params": second, "weight_decay": 0.0}]
    split = techniques.layer_wise(groups, parameters, lr=8.0, decay=0.5)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in split] == [
        (1, 1.0, 0.1),
        (2, 2.0, 0.1),
        (1, 4.0, 0.0),
        (2, 8.0, 0.0),
    ]
    with pytest.raises(ValueError, match="Remedy: leave it out"):
        techniques.rate_factors(["embedding", "head"], 0.5)


def test_a_child_with_both(pool: RankPool, folder: Path) -> None:
    """Adam's first step is as long as the rate, so it says which rate a weight had; outside the child nothing moves."""
    one_step = {"max_steps": 1, "warmup": 0, "reserve_p": 0.3, "layer_decay": 0.5, "output": folder / "tuned"}
    ended = [
        pool[2].run(finetune_jobs.run, folder, options(folder, **one_step, **more)) for more in ({}, {"r_drop": 1e4})
    ]
    assert not any(end.error for of in ended for end in of)
    plain, dropped = (of[0].result for of in ended)
    assert dropped["train_loss"] > 1.01 * plain["train_loss"], "vacuous: dropout made no difference"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert").state_dict()
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tuned").state_dict()
    factors = {
        "bert.embeddings.": 0.125,
        "bert.encoder.layer.0.": 0.25,
        "bert.encoder.layer.1.": 0.5,
        "bert.pooler.": 1,
    }
    for prefix, factor in factors.items():
        names = [name for name in base if name.startswith(prefix)]
        moved = torch.cat([(tuned[name] - base[name]).abs().flatten() for name in names])
        assert float(moved.max()) == pytest.approx(0.01 * factor, rel=0.01), prefix
        if "layer" in prefix:
            assert 0.05 < float((moved > 0).float().mean()) < 0.6, "a share of each block is the child"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r_drop": 1.0, "task": "regression"}, "--r-drop: expected --task classification"),
        ({"layer_decay": 0.0}, "--layer-decay: expected more than 0"),
    ],
)
def test_what_cannot_be_is_refused(pool: RankPool, folder: Path, given: dict[str, Any], says: str) -> None:
    (end,) = pool[1].run(finetune_jobs.run, folder, options(folder, **given))
    assert says in end.error

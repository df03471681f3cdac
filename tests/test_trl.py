"""TRL's trainers with the one line: SFT, DPO with its reference model, GRPO with what it generates. On two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

import ds_childtune
from tests.support.ranks import RankPool
from tests.support.trainers import Run, arguments, config, fresh_accelerate, run_of, tiny_gpt2, whole_weights

pytest.importorskip("trl")

COMPACT = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact", "clip": "child"}
WORDS = [f"w{i}" for i in range(37)]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", *WORDS])}
    of_words = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]", model_max_length=16
    )


def texts(first: int, length: int = 4) -> list[str]:
    """A text for each of 24 rows."""
    return [" ".join(WORDS[(first + row * 5 + place) % len(WORDS)] for place in range(length)) for row in range(24)]


def unlike_neighbours(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(text.split()))) + len(text) / 100 for text in completions]


def trainer_of(kind: str, args: Any, callback: ds_childtune.ChildTuningCallback, model: Any) -> Any:
    import trl

    shared = {"args": args, "processing_class": tokenizer(), "callbacks": [callback]}
    if kind == "SFT":
        return trl.SFTTrainer(model, train_dataset=Dataset.from_dict({"text": texts(0, 8)}), **shared)
    if kind == "DPO":
        rows = Dataset.from_dict({"prompt": texts(0), "chosen": texts(3), "rejected": texts(11)})
        return trl.DPOTrainer(model, ref_model=tiny_gpt2(), train_dataset=rows, **shared)
    prompts = Dataset.from_dict({"prompt": texts(0)})
    return trl.GRPOTrainer(model, reward_funcs=unlike_neighbours, train_dataset=prompts, **shared)


def train(kind: str, stage: int, folder: str, resume: str | None = None) -> Run:
    import trl

    options: dict[str, Any] = {"bf16": False, "gradient_accumulation_steps": 1, "learning_rate": 0.05}
    if kind == "GRPO":
        options |= {"num_generations": 2, "max_completion_length": 4, "steps_per_generation": 1}
    else:
        options |= {"max_length": 16}
    with fresh_accelerate():
        made = getattr(trl, f"{kind}Config")
        args = arguments(folder, config(stage, COMPACT), make=made, **options)
        model = tiny_gpt2()
        before = whole_weights(model)
        callback = ds_childtune.ChildTuningCallback()
        trainer = trainer_of(kind, args, callback, model)
        trainer.train(resume_from_checkpoint=resume)
        return run_of(trainer, callback, before)


def train_and_resume(kind: str, stage: int, folder: str) -> tuple[Run, Run]:
    return train(kind, stage, folder), train(kind, stage, folder, resume=f"{folder}/checkpoint-2")


@pytest.mark.parametrize(("kind", "stage"), [("SFT", 3), ("DPO", 2), ("DPO", 3), ("GRPO", 3)])
def test_only_the_child_trains_and_is_resumed(pool: RankPool, tmp_path: Path, kind: str, stage: int) -> None:
    for run, resumed in pool[2].run(train_and_resume, kind, stage, str(tmp_path)):
        assert run.outside_moved() == resumed.outside_moved() == 0
        assert run.inside_moved() > 0.2
        assert run.step == resumed.step == 4
        assert run.report.density == pytest.approx(0.3, abs=0.01)
        assert all(torch.equal(run.masks[n], resumed.masks[n]) for n in run.masks)
        if kind != "GRPO":  # generates other texts: a checkpoint does not have the sampler's state
            assert all(torch.equal(run.end[n], resumed.end[n]) for n in run.end)

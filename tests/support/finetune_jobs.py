"""launch/finetune.py on tiny models and data: its arguments, and runs of it in ranks that are there already."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.engines import Weights
from tests.support.trainers import whole_weights

ROOT = Path(__file__).parents[2]
WORDS = ["good", "fine", "bad", "poor", "film", "book", "song", "the", "a", "was"]


def make_inputs(folder: Path) -> None:
    """A tiny BERT and GPT-2 as transformers folders, and data: a text's first word says its label."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]", model_max_length=32
    )
    bert = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    gpt2 = transformers.GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.set_seed(0)
    for name, model in (("bert", transformers.BertModel(bert)), ("gpt2", transformers.GPT2LMHeadModel(gpt2))):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    for name, count in (("train", 40), ("eval", 13)):
        rows = [
            {"text": f"{WORDS[i % 4]} {WORDS[4 + i % 3]} {'was the ' * (i % 5)}", "label": i % 4 // 2}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Of a short run on BERT, by the names of `Arguments`."""
    files = {"train_file": folder / "train.jsonl", "eval_file": folder / "eval.jsonl"}
    few = {"batch_size": 4, "max_steps": 4, "lr": 0.01, "max_length": 16}
    return {"model": f"{folder}/bert", **files, **few, **more}


def command_line(given: dict[str, Any]) -> list[str]:
    """The same options as the command takes them."""
    words = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


@dataclass(frozen=True)
class Ended:
    """One rank's view of a run: its result, or what it raised."""

    result: dict[str, Any]
    error: str


def run_watched(folder: Path, given: dict[str, Any]) -> tuple[Ended, list[Weights]]:
    """A run, and what trains after each of its steps except the last."""
    seen: list[Weights] = []
    sys.path.insert(0, str(ROOT / "launch"))
    from child_choice import ChildChoice

    after = ChildChoice.after

    def watched(choice: ChildChoice, step: int) -> None:
        weights = whole_weights(choice.engine.module)
        seen.append({n: weights[n] for n, p in choice.engine.module.named_parameters() if p.requires_grad})
        after(choice, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChildChoice, "after", watched)
        return run(folder, given), seen


def run(folder: Path, given: dict[str, Any]) -> Ended:
    """A run on ranks that have a process group, as a script of the user's own would have it."""
    if str(ROOT / "launch") not in sys.path:
        sys.path.insert(0, str(ROOT / "launch"))
    import datasets
    import finetune
    from arguments import Arguments

    datasets.config.HF_DATASETS_CACHE = folder / "hf"
    datasets.disable_progress_bars()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)  # DeepSpeed's view of the group that is there
    generators = torch.get_rng_state()
    try:
        return Ended(finetune.run(Arguments(**given)), "")
    except ValueError as error:
        return Ended({}, str(error))
    finally:
        torch.set_rng_state(generators)

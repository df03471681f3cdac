"""A Hugging Face Trainer whose model trains a child network, as a user would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

import ds_childtune


class ChildTuning(TrainerCallback):
    """Attach before the first step, when the engine exists."""

    def __init__(self, trainer: Trainer, resume_from: str | None = None) -> None:
        self.trainer = trainer
        self.resume_from = resume_from
        self.child: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        engine = self.trainer.model_wrapped
        self.child = ds_childtune.attach(engine)
        if self.resume_from is None:
            self.child.select(self.trainer.get_train_dataloader())
        else:
            # The Trainer has loaded it too, before the child was there.
            engine.load_checkpoint(self.resume_from)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=hasattr(next(iter(named.values())), "ds_id")):
        return {name: p.detach().clone() for name, p in named.items()}


def run(folder: Path, stage: int) -> dict[str, Any]:
    """Three steps; and the last of them again, from a checkpoint, in another Trainer."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "child_tuning": {"mode": "ChildTuning-D", "reserve_p": 0.3},
    }
    args = TrainingArguments(
        output_dir=str(folder / f"trainer-{stage}"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=3,
        use_cpu=True,
        deepspeed=config,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    rows = rows.map(lambda row: tokenizer(row["text"]) | {"labels": row["label"]}, remove_columns=rows.column_names)

    def train(resume_from: str | None) -> tuple[Trainer, Any, dict[str, torch.Tensor]]:
        """A Trainer that is done, its child, and the weights that it began with."""
        transformers.set_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
        before = weights(model)
        trainer = Trainer(
            model, args, train_dataset=rows, data_collator=transformers.DataCollatorWithPadding(tokenizer)
        )
        callback = ChildTuning(trainer, resume_from)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer, callback.child, before

    trainer, child, before = train(None)
    masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
    moved = {name: weight != before[name] for name, weight in weights(trainer.model).items()}
    answer = {
        "step": child.step,
        "density": child.report().density,
        "outside moved": sum(int((moved[name] & ~mask).sum()) for name, mask in masks.items()),
        "inside moved": sum(int((moved[name] & mask).sum()) for name, mask in masks.items())
        / sum(int(mask.sum()) for mask in masks.values()),
    }
    child.detach()
    whole = weights(trainer.model)
    AcceleratorState._reset_state()  # it allows for one DeepSpeed run in a process
    trainer, child, _ = train(f"{args.output_dir}/checkpoint-2")
    resumed = weights(trainer.model)
    answer["resumed differs in"] = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    answer["resumed step"] = child.step
    child.detach()
    AcceleratorState._reset_state()
    transformers.integrations.unset_hf_deepspeed_config()
    return answer

"""What README and docs show, found and run: fenced blocks, the links between pages, commands."""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import os
import re
import shlex
import shutil
import symtable
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import transformers
from typer.testing import CliRunner

import ds_childtune
from ds_childtune.__main__ import app
from tests.support import trainers
from tests.support.engines import Setup, engine_of, train_step
from tests.support.models import Batch, batches, build

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ds_configs/README.md")), *(ROOT / "docs").glob("*.md")]
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """Of all pages."""
    found = []
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        for match in FENCE.finditer(text):
            found.append(Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def code_of(block: Block) -> str:
    """Python: of a diff, what it leads to."""
    if block.language != "diff":
        return block.text
    return "".join(line[1:] for line in block.text.splitlines(keepends=True) if not line.startswith("-"))


# ---------------------------------------------------------------- Python

SETUP = Setup("bert", stage=3)
BLOCK = {
    "mode": "ChildTuning-D",
    "reserve_p": 0.1,
    "include": ["*"],
    "optimizer_state": "compact",
    "clip": "child",
}


def free_names(code: str) -> set[str]:
    """Names that a block uses and does not make."""
    module = symtable.symtable(code, "<documentation>", "exec")
    made = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    return _globals(module) - made - set(dir(builtins))


def _globals(scope: symtable.SymbolTable) -> set[str]:
    is_module = scope.get_type() == "module"
    own = {s.get_name() for s in scope.get_symbols() if s.is_referenced() and (is_module or s.is_global())}
    return own.union(*map(_globals, scope.get_children()))


def config() -> dict[str, Any]:
    return SETUP.config() | {"child_tuning": BLOCK}


def micro_batches(count: int = 3) -> list[Batch]:
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    return [{k: v.to(device) for k, v in batch.items()} for batch in batches(SETUP.family, count)]


def engine() -> Any:
    made, *_ = deepspeed.initialize(model=build(SETUP.family), config=config())
    return made


def trained_child() -> ds_childtune.ChildTuner:
    child = ds_childtune.attach(engine())
    child.select(micro_batches())
    train_step(child.engine, micro_batches(1))
    return child


def trainer_arguments() -> Any:
    return trainers.arguments("trained", trainers.config(3, BLOCK), max_steps=1, save_strategy="no")


def rows() -> list[Batch]:
    """As a Trainer's data set has them."""
    return [{key: values[i] for key, values in batch.items()} for batch in micro_batches() for i in range(2)]


def mixtral() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 31, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **heads))


def token_batches() -> list[Batch]:
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    ids = torch.arange(12, device=device).view(2, 6)
    return [{"input_ids": ids, "labels": ids}]


PROVIDED: dict[str, Callable[[], Any]] = {
    "ds_childtune": lambda: ds_childtune,
    "deepspeed": lambda: deepspeed,
    "torch": lambda: torch,
    "model": lambda: build(SETUP.family),
    "config": config,
    "calibration_batches": micro_batches,
    "general_batches": micro_batches,
    "loader": micro_batches,
    "moe": mixtral,
    "moe_batches": token_batches,
    "args": trainer_arguments,
    "train_dataset": rows,
    "engine": engine,
    "child": trained_child,
}
"""What a block may take for granted."""


def prepare(folder: str) -> None:
    """A base model, a DeepSpeed config, two children and a checkpoint, as the pages call them. On one rank."""
    Path(folder, "ds_config.json").write_text(json.dumps(config()))
    build(SETUP.family).save_pretrained(f"{folder}/bert-base")  # type: ignore[operator]
    for seed, task in enumerate(("rte", "mrpc")):
        with engine_of(SETUP, child_tuning=BLOCK) as made:
            child = ds_childtune.attach(made)
            child.select(batches(SETUP.family, 3, seed=seed))
            train_step(made, batches(SETUP.family, 1, seed=seed))
            child.export(f"{folder}/tasks/{task}")
            if task == "rte":
                made.save_checkpoint(f"{folder}/saved")
                train_step(made, batches(SETUP.family, 1, seed=2))
                child.export(f"{folder}/tasks/rte-2")
            child.detach()


@contextlib.contextmanager
def copy_of(folder: str, *, with_checkpoint: bool = False) -> Iterator[Path]:
    """Be in a fresh copy of the prepared folder for the length of a `with`."""
    here, copy = Path.cwd(), Path(folder).with_name("copy")
    shutil.copytree(folder, copy)
    if with_checkpoint:
        shutil.copytree(copy / "saved", copy / "checkpoints")
    os.chdir(copy)
    try:
        yield copy
    finally:
        os.chdir(here)
        shutil.rmtree(copy)


def run_code(code: str, folder: str, *, with_checkpoint: bool = False) -> dict[str, Any]:
    """Run a block on one rank, with the names that it takes for granted. Returns what can be asked about it."""
    wanted = free_names(code)
    assert wanted <= PROVIDED.keys(), f"names that no test provides: {sorted(wanted - PROVIDED.keys())}"
    with trainers.fresh_accelerate():
        names = {name: PROVIDED[name]() for name in wanted}
    try:
        with copy_of(folder, with_checkpoint=with_checkpoint) as copy, trainers.fresh_accelerate():
            exec(compile(code, "<documentation>", "exec"), names)
            call_back(names)
            child = names.get("child")
            return {
                "steps": child.step if isinstance(child, ds_childtune.ChildTuner) else None,
                "files": sorted(str(path.relative_to(copy)) for path in copy.rglob("*")),
            }
    finally:
        for value in {id(v): v for v in names.values()}.values():
            put_away(value)
        names.clear()
        gc.collect()


def error_of(code: str, folder: str) -> str | None:
    """What a block ends with, or None."""
    try:
        run_code(code, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def call_back(names: dict[str, Any]) -> None:
    """What the Trainer does with a callback that a block defines."""
    for cls in [v for v in names.values() if isinstance(v, type) and issubclass(v, transformers.TrainerCallback)]:
        if cls is transformers.TrainerCallback:
            continue
        for resume_from in (None, "saved"):
            trainer = SimpleNamespace(model_wrapped=engine(), get_train_dataloader=micro_batches)
            callback = cls(trainer, resume_from)
            callback.on_train_begin(None, None, None)
            assert callback.child.report().density < 1
            assert callback.child.step == (0 if resume_from is None else 1)
            put_away(callback.child.engine)


def put_away(value: Any) -> None:
    made = value.engine if isinstance(value, ds_childtune.ChildTuner) else getattr(value, "model_wrapped", value)
    if isinstance(made, deepspeed.DeepSpeedEngine) and made.optimizer is not None:
        child = getattr(made, "child_tuner", None)
        if child is not None:
            child.detach()
        made.destroy()


# ---------------------------------------------------------------- commands


def commands(block: Block) -> list[list[str]]:
    """The words of every line, without comments and leading NAME=VALUE."""
    found = []
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def run_command_line(lines: list[list[str]], folder: str) -> list[str]:
    """`ds_childtune ...`, one line after the other, on one rank; what each prints."""
    with copy_of(folder):
        outputs = []
        for line in lines:
            result = CliRunner().invoke(app, line, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            outputs.append(result.output)
        return outputs

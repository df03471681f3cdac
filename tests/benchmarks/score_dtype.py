"""How much of the child two-byte scores pick out: overlap with fp32's on a real model and real articles.

    deepspeed --num_gpus 1 tests/benchmarks/score_dtype.py

Beside it, what is to be expected from other calibration data: the overlap of two halves of the articles.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ds_childtune
from ds_childtune.child.generator import bernoulli_mask
from ds_childtune.shards import Fragment

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import finetune


def scores_of(engine: Any, batches: list[Any], dtype: str) -> torch.Tensor:
    """fp32 1-D: every eligible element's mean, on one rank."""
    block = {"mode": "ChildTuning-D", "reserve_p": 0.1, "fisher": {"score_dtype": dtype}}
    child = ds_childtune.attach(engine, block)
    fisher = child.estimate_fisher(batches)
    child.detach()
    return torch.cat([s.float() / fisher.terms for s in itertools.chain(*fisher.sums)])


def top(scores: torch.Tensor, p: float) -> torch.Tensor:
    """bool: exactly round(p * n) elements, those with equal scores in the order of their index."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.sort(descending=True, stable=True).indices[: round(p * scores.numel())]] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    args = finetune.Arguments(ds_config=Path("ds_configs/zero1_child_d.json"), precision="fp32", max_length=64)
    with finetune.processes():
        config = finetune.read_ds_config(args)
        del config["child_tuning"]
        tokenizer = finetune.load_tokenizer(args)
        data = finetune.load_data(args, tokenizer)
        model = finetune.load_model(args, config, data.labels, tokenizer.pad_token_id)
        engine = finetune.start_engine(args, config, model, 1)
        collate = finetune.collator(args.task, tokenizer)
        rows = [data.eval[i] for i in range(min(options.articles, len(data.eval)))]
        batches = [collate(rows[i : i + options.batch]) for i in range(0, len(rows), options.batch)]
        exact, half = scores_of(engine, batches, "fp32"), scores_of(engine, batches, "e8m8")
        parts = [scores_of(engine, batches[i::2], "fp32") for i in (0, 1)]
        print(
            f"MiniLM-L6, {exact.numel():,} eligible elements, {len(batches)} micro-batches of {options.batch} BBC articles,"
            f" torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n"
        )
        print("| reserve_p | e8m8 and fp32 | two halves of the data, fp32 | chance |\n|---|---|---|---|")
        for p in (0.05, 0.1, 0.3):
            child = top(exact, p)
            chance = child & bernoulli_mask(Fragment("", 0, 0, child.numel()), 0, 0, p, device=child.device)
            cells = [child & top(half, p), top(parts[0], p) & top(parts[1], p), chance]
            print(f"| {p} | " + " | ".join(f"{float(cell.sum() / child.sum()):.4f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()

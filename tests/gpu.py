"""What one accelerator can show in nine minutes: see `tests/gpu.sh`.

Four parts, in the order of their worth: what is installed, the selected suite of `tests/gpu_suite.py`, a table of contenders on a
random Llama, and the largest model that takes two steps. Each has a share of the time, and what it has found by then is kept.
Contenders of a stage run in one process, one after the other; each begins with an empty device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
PARTS = ("suite", "table", "largest")
PACKAGES = (
    "ds_childtune",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "numpy",
    "pydantic",
    "safetensors",
)

STAGES = (3, 1)
CONTENDERS = ("plain", "low-precision states", "LoRA r=16", "child p=0.05", "child p=0.1")
BLOCK = {
    "mode": "ChildTuning-D",
    "include": ["*"],
    "optimizer_state": "compact",
    "clip": "child",
    "fisher": {"score_dtype": "e8m8"},
}
STEPS = 6
"""The first two are not timed."""


# ---------------------------------------------------------------- what is installed


def environment() -> dict[str, Any]:
    import torch
    from deepspeed.accelerator import get_accelerator

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    accelerator = get_accelerator()
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "accelerator": accelerator.device_name(),
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "not a git checkout",
        "date": time.strftime("%Y-%m-%d"),
        "compiler": (_output("nvcc", "--version").splitlines() or ["no nvcc"])[-1],
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {"device": device.name, "device GiB": round(device.total_memory / GIB, 1), "CUDA": torch.version.cuda}
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---------------------------------------------------------------- the suite


def suite(seconds: float, tiny: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu_suite.py",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    # Versions that are there may warn of what the pinned ones do not.
    command += ["-W", "default", *(["-k", "compact_is_the_dense_path and zero3-odd"] if tiny else [])]
    text = _bounded(command, seconds)
    last = text.strip().splitlines()[-1] if text.strip() else "nothing"
    failed = [line[:400] for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "result": last,
        "failed": failed,
        "ended": not text.endswith(_CUT),
        "output": text[-20_000:] if failed else "",
    }


_CUT = "\n(cut off here: its time was over)"


def _bounded(command: list[str], seconds: float) -> str:
    """What a command prints, for so long at most."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=max(seconds, 1))[0]
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        return process.communicate()[0] + _CUT


# ---------------------------------------------------------------- contenders, in a process of their own


def config_of(stage: int, contender: str, fused: bool) -> dict[str, Any]:
    """Buckets are small beside the model, as a card that is full has them."""
    import torch

    bucket = 50_000_000 if torch.cuda.is_available() else 50_000
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "sub_group_size": 4 * bucket}
        zero |= {"stage3_max_live_parameters": 4 * bucket, "stage3_max_reuse_distance": 4 * bucket}
    bf16: dict[str, Any] = {"enabled": True}
    if contender == "low-precision states":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": bf16,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": not fused}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
    }


class Meter:
    """Bytes of tensors on the device above what was there before the contender; on a CPU a peak is only what is left."""

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._on_cpu = self._accelerator.device_name() == "cpu"
        self.empty()
        self._base = self._now()
        self.peak = 0

    def empty(self) -> None:
        gc.collect()
        if not self._on_cpu:
            self._accelerator.synchronize()
            self._accelerator.empty_cache()
            self._accelerator.reset_peak_memory_stats()

    @contextmanager
    def phase(self) -> Iterator[dict[str, float]]:
        """Fills in seconds, and the peak and live GiB, at the end."""
        found: dict[str, float] = {}
        if not self._on_cpu:
            self._accelerator.reset_peak_memory_stats()
        start = time.perf_counter()
        yield found
        self.wait()
        found["seconds"] = time.perf_counter() - start
        highest = self._now() if self._on_cpu else self._accelerator.max_memory_allocated()
        gc.collect()
        found["peak GiB"] = (highest - self._base) / GIB
        found["live GiB"] = (self._now() - self._base) / GIB
        self.peak = max(self.peak, highest - self._base)

    def wait(self) -> None:
        if not self._on_cpu:
            self._accelerator.synchronize()

    def _now(self) -> int:
        if self._on_cpu:
            from tests.benchmarks import memory

            return memory.live_storages()
        return int(self._accelerator.memory_allocated())


def train(contender: str, stage: int, size: str, length: int, steps: int, fused: bool) -> dict[str, Any]:
    """One contender's figures."""
    import deepspeed
    import torch

    import ds_childtune
    from tests.benchmarks import llama

    config = config_of(stage, contender, fused)
    block = None
    if contender.startswith("child"):
        block = BLOCK | {"reserve_p": float(contender.partition("p=")[2])}
    meter, phases = Meter(), {}
    with meter.phase() as phases["start"]:
        model = _model(size, stage, config)
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        if contender.startswith("LoRA"):
            model = _with_lora(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        lean = block is not None and stage == 3
        with ds_childtune.lean_start() if lean else nullcontext():
            engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    batch = llama.batch_of(0, engine.device, 1, length, model.config.vocab_size)
    found: dict[str, Any] = {"elements": elements}
    if block is not None:
        with meter.phase() as phases["select"]:
            report = ds_childtune.attach(engine, block).select([batch] * 4)
        found |= {"Fisher seconds": report.fisher_seconds, "selection seconds": report.selection_seconds}
    times, losses = [], []
    with meter.phase() as phases["steps"]:
        for _ in range(steps):
            meter.wait()
            start = time.perf_counter()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            meter.wait()
            times.append(time.perf_counter() - start)
            losses.append(loss.detach())
            del loss
    engine.destroy()
    found |= {
        "ms a step": statistics.median(times[2:] or times) * 1e3,
        "losses": [round(float(loss), 3) for loss in losses],
        "peak GiB": meter.peak / GIB,
        "live GiB": phases["steps"]["live GiB"],
        "live bytes a parameter": phases["steps"]["live GiB"] * GIB / elements,
        "phases": phases,
    }
    if not all(torch.isfinite(loss) for loss in losses):
        found["failed"] = "a loss is not finite"
    return found


def _model(size: str, stage: int, config: dict[str, Any]) -> Any:
    """Random weights: partitioned from the start at ZeRO-3, else made where they stay."""
    import torch
    import transformers
    from deepspeed.accelerator import get_accelerator

    from tests.benchmarks import llama

    if stage == 3:
        return llama.build(size, config)
    torch.manual_seed(0)
    with torch.device(get_accelerator().current_device_name()):
        return transformers.LlamaForCausalLM(llama.config_of(size)).bfloat16()


def _with_lora(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def attempt(contender: str, *arguments: Any) -> dict[str, Any]:
    """Figures, or why there are none. The device is empty afterwards."""
    import torch

    if contender.startswith("LoRA") and importlib.util.find_spec("peft") is None:
        return {"failed": "peft is not installed"}
    try:
        return train(contender, *arguments)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error)[:120]}"}
    except Exception as error:  # the other contenders are to run
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}
    finally:
        gc.collect()


def work(args: argparse.Namespace) -> None:
    """A worker's part: each result becomes a line of the file `--results` as soon as it is there."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29611",
    }
    deepspeed.init_distributed("gloo" if on_cpu else None, auto_mpi_discovery=False, verbose=False)
    fused = _fused_adam_works()
    # What is loaded and compiled on first use belongs to nobody.
    attempt("child p=0.1", args.stage, "64x1", args.length, 2, fused)
    gc.freeze()  # nor is it looked through whenever bytes are counted

    def keep(**line: Any) -> None:
        with args.results.open("a") as file:
            file.write(json.dumps({"stage": args.stage, "FusedAdam": fused, **line}) + "\n")

    if args.work == "table":
        for contender in CONTENDERS:
            found = attempt(contender, args.stage, args.size, args.length, STEPS, fused)
            keep(contender=contender, size=args.size, **found)
    else:
        largest(args, fused, keep)
    from deepspeed import comm as dist

    dist.destroy_process_group()


def _fused_adam_works() -> bool:
    import torch
    from deepspeed.accelerator import get_accelerator

    try:
        from deepspeed.ops.adam import FusedAdam

        where = get_accelerator().current_device_name()
        parameter = torch.nn.Parameter(torch.ones(3, device=where))
        parameter.grad = torch.ones_like(parameter)
        FusedAdam([parameter]).step()
    except Exception as error:
        print(f"FusedAdam does not work here, torch's AdamW takes its place: {str(error)[:300]}", file=sys.stderr)
        return False
    return True


def largest(args: argparse.Namespace, fused: bool, keep: Callable[..., None]) -> None:
    """Models of more and more layers until two steps do not fit. Contenders take turns, as the time may end any of them."""
    hidden, first = map(int, args.size.split("x"))
    limit = _device_bytes(args)
    searches = {
        contender: Search(_first_guess(contender, args, first, limit)) for contender in ("child p=0.1", "plain")
    }
    for _ in range(args.tries):
        for contender, search in searches.items():
            if search.layers is None:
                continue
            size = f"{hidden}x{search.layers}"
            found = attempt(contender, args.stage, size, args.length, 2, fused)
            keep(contender=contender, size=size, **found)
            search.learn(found.get("peak GiB", 0) * GIB / limit, failed="failed" in found)


def _first_guess(contender: str, args: argparse.Namespace, layers: int, limit: float) -> int:
    """From the table's peak, where it has one."""
    table = args.results.with_name(f"table-{args.stage}.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    peaks = [row["peak GiB"] * GIB for row in rows if row["contender"] == contender and "failed" not in row]
    return max(1, int(layers * 0.9 * limit / peaks[0])) if peaks else layers


class Search:
    """The number of layers to try next: grown by the share of the device that the last one took, then halved between two."""

    def __init__(self, layers: int) -> None:
        self.layers: int | None = layers
        """None: there is nothing between what fits and what does not."""
        self._fits, self._too_large = 0, 0

    def learn(self, share: float, *, failed: bool) -> None:
        """`share`: peak over what the device has."""
        assert self.layers is not None
        if failed or share > 1:
            self._too_large = self.layers
        else:
            self._fits = self.layers
        if self._too_large:
            middle = (self._fits + self._too_large) // 2
            self.layers = middle if middle > self._fits else None
        else:
            self.layers = max(self._fits + 1, int(self._fits * 0.95 / share))


def _device_bytes(args: argparse.Namespace) -> float:
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return args.pretend_gib * GIB


# ---------------------------------------------------------------- the whole


def tables(results: dict[str, Any]) -> str:
    """The rows of what was found, for people."""
    lines = [
        "| ZeRO | contender | parameters | peak GiB | live GiB | live bytes a parameter | ms a step | Fisher s | selection s |",
        "|" + "---|" * 9,
    ]
    for row in results.get("table", []):
        lines.append(_row(row))
    for row in results.get("largest", []):
        lines.append(_row(row | {"contender": f"{row['contender']}, size {row['size']}"}))
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['stage']} | {row['contender']} | {row['failed'][:100]} |" + " |" * 6
    cells = [f"{row['elements'] / 1e6:,.0f} M", f"{row['peak GiB']:.2f}", f"{row['live GiB']:.2f}"]
    cells += [f"{row['live bytes a parameter']:.2f}", f"{row['ms a step']:.1f}"]
    cells += [f"{row[key]:.2f}" if key in row else "" for key in ("Fisher seconds", "selection seconds")]
    return f"| {row['stage']} | {row['contender']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument(
        "--size", default="4096x16", help="HIDDENxLAYERS of the table's Llama; the default has 3.6 B parameters"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}, with commas between them")
    parser.add_argument("--stages", default=",".join(map(str, STAGES)), help="ZeRO stages of the table")
    parser.add_argument("--tries", type=int, default=3, help="sizes that each contender may try for the largest model")
    parser.add_argument("--tiny", action="store_true", help="sizes and cells for a CPU: whether the script works")
    parser.add_argument("--work", choices=["table", "largest"], help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pretend-gib", type=float, default=0.02, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    begin = time.monotonic()

    def left() -> float:
        return args.seconds - (time.monotonic() - begin)

    stages = [int(stage) for stage in args.stages.split(",")]
    parts = args.only.split(",") if args.only else PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    if args.tiny:
        args.size, args.length, args.tries = "64x2", 16, 1
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment()}
    print(json.dumps(results["environment"], indent=1), flush=True)

    def save() -> None:
        results["seconds"] = round(time.monotonic() - begin, 1)
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))

    if "suite" in parts:
        results["suite"] = suite(left() * (0.5 if len(parts) > 1 else 0.95), args.tiny)
        print(results["suite"]["output"], results["suite"]["result"], sep="\n", flush=True)
        save()
    if "table" in parts:
        budget = left() * (0.7 if "largest" in parts else 0.95)
        results["table"], notes = [], []
        for stage in stages:
            rows, note = _worker("table", stage, args, budget / len(stages))
            results["table"] += rows
            notes += note
        results["table notes"] = notes
        save()
    if "largest" in parts:
        results["largest"], results["largest notes"] = _worker("largest", 3, args, left() * 0.95)
    save()
    text = tables(results)
    (args.out / "gpu.md").write_text(text + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "environment"}))
    print(text)
    sys.exit(exit_code(results, len(stages) if "table" in parts else 0))


def _worker(what: str, stage: int, args: argparse.Namespace, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """A worker's rows, and the end of what it printed if it did not end well."""
    results = args.out / f"{what}-{stage}.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu", "--work", what, "--stage", str(stage), "--results", str(results)]
    command += ["--size", args.size, "--length", str(args.length), "--tries", str(args.tries)]
    text = _bounded(command, seconds)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    expected = len(CONTENDERS) if what == "table" else 1
    wrong = text.endswith(_CUT) or len(rows) < expected or "FusedAdam does not work" in text
    return rows, [text[-3000:]] if wrong else []


def exit_code(results: dict[str, Any], stages: int) -> int:
    """0 where the suite passed to its end, and every contender has figures or a reason that is no fault of ours."""
    passed = "suite" not in results or (
        results["suite"]["ended"]
        and not results["suite"]["failed"]
        and re.search(r"\d+ passed", results["suite"]["result"])
    )
    known = ("out of memory", "peft is not installed")
    wrong = [r for r in results.get("table", []) if "failed" in r and not r["failed"].startswith(known)]
    short = len(results.get("table", [])) < len(CONTENDERS) * stages
    return 0 if passed and not wrong and not short else 1


if __name__ == "__main__":
    main()

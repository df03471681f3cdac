"""What a child costs under ZeRO-3: memory of every phase, optimizer step and iteration, against plain DeepSpeed.

    python -m tests.benchmarks.compact                       # 165 M parameters, all contenders, 3 rounds
    python -m tests.benchmarks.compact --size 1.1b --rounds 1 --only plain,compact-0.1
    python -m tests.benchmarks.compact --size 2560x24 --only lean-0.1 --limit-gib 12 --return-memory

Every contender runs in separate processes, as memory that one has freed may not go back to the system; rounds take
turns. A contender over the memory limit is stopped, and its row says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GIB = 1 << 30

FUSED = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}}
TORCH = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": True}}

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 10_000_000,
        "stage3_prefetch_bucket_size": 10_000_000,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 50_000_000,
        "stage3_max_reuse_distance": 50_000_000,
        "sub_group_size": 100_000_000,
    },
    "optimizer": FUSED,
    "steps_per_print": 1_000_000,
}


def contender(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The DeepSpeed config and the child's block: plain, plain-offload, plain-torch, hook-P, compact-P, lean-P."""
    config = copy.deepcopy(CONFIG)
    kind, _, option = name.partition("-")
    if kind == "plain":
        if option == "torch":
            config["optimizer"] = TORCH
        if option == "offload":
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        return config, None
    child: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": float(option), "include": ["*"]}
    if kind.startswith("compact"):
        # The clip is the child's, as DeepSpeed clips to 1.0 unless told otherwise, and a dense norm would need dense gradients.
        child |= {"optimizer_state": "compact", "clip": "child"}
    if kind == "lean":
        child |= {"optimizer_state": "compact", "clip": "child", "fisher": {"score_dtype": "e8m8"}}
    return config, child


# ---------------------------------------------------------------- one contender, on every rank


def job(args: argparse.Namespace) -> None:
    import deepspeed
    import torch
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    import ds_childtune
    from ds_childtune.selection import selectors as choosing
    from tests.benchmarks import llama, memory

    config, block = contender(args.job)
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    deepspeed.init_distributed("gloo" if on_cpu else get_accelerator().communication_backend_name(), verbose=False)
    # A tiny engine first: what is loaded and compiled on first use is none of the contender's memory.
    import torch._dynamo  # before zero.Init replaces torch's constructors, as torch AdamW would import it in between

    warm = llama.build("64x1", config)
    engine, *_ = deepspeed.initialize(model=warm, model_parameters=list(warm.parameters()), config=config)
    for _ in range(2):
        engine.backward(engine(**llama.batch_of(0, engine.device, args.rows, args.length, 4096)).loss)
        engine.step()
    engine.destroy()
    del engine, warm
    timeline = memory.Timeline()

    with timeline.phase("start"):
        model = llama.build(args.size, config)
        with ds_childtune.lean_start() if args.job.startswith("lean") else nullcontext():
            engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    shard = llama.elements(model) / dist.get_world_size()
    vocabulary = model.config.vocab_size
    batch = llama.batch_of(dist.get_rank(), engine.device, args.rows, args.length, vocabulary)
    seconds: dict[str, float] = {}
    if block is not None:
        child = ds_childtune.attach(engine, block)
        found: list[Any] = []
        with timeline.phase("Fisher"):
            find_cut = choosing.find_cut

            def cut_then_next_phase(*arguments: Any) -> Any:
                timeline.peaks["Fisher"] = memory.status("VmHWM") - timeline.base
                memory.reset_peak()
                cut = find_cut(*arguments)
                timeline.peaks["selection"] = memory.status("VmHWM") - timeline.base
                memory.reset_peak()
                found.append(timeline.peaks["Fisher"])
                return cut

            choosing.find_cut = cut_then_next_phase  # type: ignore[assignment]
            report = child.select([batch] * args.calibration)
            choosing.find_cut = find_cut
        timeline.peaks["compaction"], timeline.peaks["Fisher"] = timeline.peaks["Fisher"], found[0]
        timeline.resident["compaction"] = timeline.resident.pop("Fisher")
        timeline.live["compaction"] = timeline.live.pop("Fisher")
        seconds |= {"Fisher": report.fisher_seconds, "selection": report.selection_seconds}

    step_seconds: list[float] = []
    spent = [0.0]

    def timed(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - start

        setattr(owner, name, run)

    # What a step costs: putting reduced gradients into their buffers, which is where a child's are gathered, and the step itself.
    timed(engine.optimizer, "partition_grads")
    timed(engine.optimizer, "step")
    iterations, losses = [], []
    with timeline.phase("steps"):
        for _ in range(args.steps):
            spent[0] = 0.0
            dist.barrier()
            start = time.perf_counter()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            iterations.append(time.perf_counter() - start)
            step_seconds.append(spent[0])
            losses.append(float(loss.detach()))
            del loss
    mine = {
        "step": statistics.median(step_seconds[1:]),
        "iteration": statistics.median(iterations[1:]),
        "elements": llama.elements(model),
        "shard": shard,
        "peaks": timeline.peaks,
        "resident": timeline.resident,
        "live": timeline.live,
        "losses": losses,
        "seconds": seconds,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        # The rank that holds most, and the slowest one.
        result = max(everyone, key=lambda r: r["peaks"]["steps"])
        result["step"] = max(r["step"] for r in everyone)
        result["losses"] = [statistics.fmean(of) for of in zip(*(r["losses"] for r in everyone), strict=True)]
        Path(args.out).write_text(json.dumps(result))
    dist.destroy_process_group()


# ---------------------------------------------------------------- the driver


def group_bytes(group: int) -> int:
    """Resident bytes of a process group, pages that processes share counted in part."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def run(name: str, args: argparse.Namespace) -> dict[str, Any] | str:
    """A contender's figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            f"--num_gpus={args.ranks}",
            f"--master_port={port}",
        ]
        command += ["--module", "tests.benchmarks.compact", "--job", name, "--out", str(out)]
        for key in ("size", "rows", "length", "steps", "calibration"):
            command += [f"--{key}", str(getattr(args, key))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if args.return_memory:
            environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            highest, why = 0, ""
            try:
                while process.poll() is None and not why:
                    highest = max(highest, group_bytes(process.pid))
                    if args.limit_gib and highest > args.limit_gib * GIB:
                        why = f"over {args.limit_gib:g} GiB"
                    time.sleep(0.5)
            finally:
                # Whatever ended the wait, an interruption too, leaves no rank behind.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if out.exists():
                return json.loads(out.read_text()) | {"highest": highest}
            log.seek(0)
            print(log.read()[-1500:], file=sys.stderr)
            # The launcher's code of a rank that the kernel killed for memory: -9, as an unsigned byte.
            return why or ("out of memory" if process.returncode == 247 else f"ended with {process.returncode}")


def spread(values: list[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} .. {format(max(values), form)})"


def table(results: dict[str, list[dict[str, Any]]], failures: dict[str, str]) -> str:
    base = next((r for n, r in results.items() if n.startswith("plain") and r), None)
    lines = [
        "| contender | live B | resident B | step ns | step ratio | iteration ratio |"
        " peak B: start | Fisher | selection | compaction | steps | last loss |",
        "|" + "---|" * 12,
    ]
    for name, runs in results.items():
        if not runs:
            lines.append(f"| {name} | {failures[name]} |" + " |" * 10)
            continue
        cells = [
            spread([r["live"]["steps"] / r["shard"] for r in runs], ".2f"),
            spread([r["resident"]["steps"] / r["shard"] for r in runs], ".2f"),
            spread([r["step"] / r["shard"] * 1e9 for r in runs], ".2f"),
        ]
        for key in ("step", "iteration"):
            pairs = list(zip(runs, base or [], strict=False))
            cells.append(spread([r[key] / b[key] for r, b in pairs], ".2f") if pairs else "")
        for phase in ("start", "Fisher", "selection", "compaction", "steps"):
            peaks = [r["peaks"][phase] / r["shard"] for r in runs if phase in r["peaks"]]
            cells.append(format(statistics.median(peaks), ".1f") if peaks else "")
        cells.append(f"{runs[0]['losses'][0]:.2f} > {runs[0]['losses'][-1]:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="165m", help="22m, 165m, 1.1b, or HIDDENxLAYERS")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--rows", type=int, default=1, help="examples per rank and step")
    parser.add_argument("--length", type=int, default=32, help="tokens per example")
    parser.add_argument("--calibration", type=int, default=2, help="Fisher's micro-batches per rank")
    parser.add_argument("--only", help="contenders, with commas between them")
    parser.add_argument("--limit-gib", type=float, help="stop a contender whose processes hold more")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="freed blocks go back to the system at once: lower peaks, slower steps",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args)
        return
    names = [f"{kind}-{p}" for kind in ("hook", "compact") for p in (0.05, 0.1, 0.3)] + ["lean-0.1"]
    names = args.only.split(",") if args.only else ["plain", "plain-offload", "plain-torch", *names]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in names:
            if name in failures:
                continue
            outcome = run(name, args)
            if isinstance(outcome, str):
                failures[name] = outcome
                print(f"{name}: {outcome}", file=sys.stderr)
            else:
                results[name].append(outcome)
                gib = outcome["highest"] / GIB
                print(
                    f"{name}: {gib:.1f} GiB at most, losses {outcome['losses']}, seconds {outcome['seconds']}",
                    file=sys.stderr,
                )
    from importlib.metadata import version

    versions = ", ".join(f"{p} {version(p)}" for p in ("ds_childtune", "deepspeed", "torch"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    elements = next((r[0]["elements"] for r in results.values() if r), 0)
    print(
        f"\n{elements / 1e6:,.0f} M parameters, ZeRO-3 bf16, {args.ranks} ranks, {args.rows} x {args.length} tokens a rank;"
        f" bytes and ns per parameter of a shard; {platform.machine()}, {os.cpu_count()} cores, {versions},"
        f" commit {commit.stdout.strip()}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(table(results, failures))


if __name__ == "__main__":
    main()

"""What launch/demo_lm.sh runs: SmolLM2-135M on Reuters R8 at ZeRO-3, plain fine-tuning and a compact child, then a table of both.

    deepspeed launch/demo_lm.py plain outputs/demo_lm
    deepspeed launch/demo_lm.py child outputs/demo_lm
    python launch/demo_lm.py table outputs/demo_lm

The folder has `data`, written by launch/study/prepare_lm.py, and gets `plain.jsonl`, `child.jsonl` and `child`, the export. A run that
is there with the same options is not run again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from arguments import Arguments
from precision import quick_in_bf16
from rich.console import Console
from rich.table import Table

Arm = Literal["plain", "child"]
ARMS: tuple[Arm, ...] = ("plain", "child")
METHODS = {"plain": "plain", "child": "ChildTuning-D"}
LRS = {"plain": 1e-4, "child": 5e-4}
"""A child takes a higher rate than plain fine-tuning."""
PRECISION: Literal["bf16", "fp32"] = "bf16" if quick_in_bf16() else "fp32"
STEPS = {"bf16": 60, "fp32": 40}
"""A step in fp32, on a CPU that is not quick in bf16, takes about twice as long."""
MB = 1e6


def arguments_of(arm: Arm, folder: Path, steps: int) -> Arguments:
    """Both arms have the same data in the same order, and the same number of steps."""
    data = folder / "data"
    return Arguments(
        model=str(data / "smollm2"),
        task="causal-lm",
        train_file=data / "r8" / "train.jsonl",
        eval_file=data / "r8" / "validation.jsonl",
        also_eval=[f"bbc={data / 'bbc' / 'validation.jsonl'}"],
        text_columns="text",
        method=METHODS[arm],  # type: ignore[arg-type]
        lr=LRS[arm],
        max_steps=steps,
        calibration_batch_size=1,
        eval_batch_size=4,
        eval_first=True,
        eval_every=steps,
        attention="eager",
        precision=PRECISION,
        ds_config=Path(__file__).with_name("demo_lm.json"),
        export=folder / "child" if arm == "child" else None,
        results=folder / f"{arm}.jsonl",
    )


def finished(args: Arguments) -> dict[str, Any] | None:
    """The result of a run with these options, if there is one. An option that it does not know had no effect on it."""
    assert args.results is not None
    wanted = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    for line in reversed(lines):
        try:
            result: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # a crash cut it short
            continue
        if all(wanted.get(key) == value for key, value in result["arguments"].items()):
            return result
    return None


def check_data(args: Arguments) -> None:
    """
    Raises:
        FileNotFoundError: for what launch/study/prepare_lm.py has not written.
    """
    files = [Path(args.model, "config.json"), args.train_file, args.eval_file]
    files += [Path(other.partition("=")[2]) for other in args.also_eval or ()]
    if missing := [str(file) for file in files if file is None or not file.exists()]:
        raise FileNotFoundError(
            f"expected the model and its texts, got none at {', '.join(missing)}. Remedy: bash launch/demo_lm.sh makes them."
        )


def summary(results: dict[Arm, dict[str, Any]], folder: Path) -> Table:
    """What the model knew before and after, and what each run held and left behind."""
    plain, child = (results[arm] for arm in ARMS)
    before, precision = plain["curve"][0], plain["arguments"]["precision"]
    p = child["ds_config"]["child_tuning"]["reserve_p"]
    where = f"ZeRO-3, {precision}, {plain['world_size']} ranks ({plain['device']})"
    table = Table(title=f"SmolLM2-135M on Reuters R8, {where}, {plain['steps']} steps")
    for column in ("", "before", "plain", f"ChildTuning-D, {p:.0%}"):
        table.add_column(column, justify="left" if not column else "right")

    def row(what: str, start: str, of: Any, form: str) -> None:
        table.add_row(what, start, *(form.format(of(result)) for result in (plain, child)))

    row(
        "perplexity on the task (R8)",
        f"{before['metrics']['perplexity']:.1f}",
        lambda r: r["metrics"]["perplexity"],
        "{:.1f}",
    )
    row(
        "perplexity on general text (BBC)",
        f"{before['also']['bbc']['perplexity']:.1f}",
        lambda r: r["also"]["bbc"]["perplexity"],
        "{:.1f}",
    )
    row("MB of tensors while training, a rank", "", lambda r: r["tensor_bytes"] / MB, "{:.0f}")
    row("MB of masters and moments, a rank", "", lambda r: r["optimizer_bytes"] / MB, "{:.0f}")
    row("MB of memory at the peak, a rank", "", lambda r: r["peak_bytes"] / MB, "{:.0f}")
    row("seconds of training", "", lambda r: r["seconds"]["training"], "{:.0f}")
    row("seconds of choosing the child", "", lambda r: r["seconds"]["fisher"] + r["seconds"]["selection"], "{:.0f}")
    model = Path(plain["arguments"]["model"], "model.safetensors").stat().st_size
    export = sum(file.stat().st_size for file in (folder / "child").iterdir())
    table.add_row("MB to keep for the task", f"{model / MB:.0f} (the model)", f"{model / MB:.0f}", f"{export / MB:.0f}")
    return table


def main(
    what: Annotated[Literal["plain", "child", "table"], typer.Argument(help="Which run, or the table of both.")],
    folder: Annotated[Path, typer.Argument(help="Its folder `data` is what prepare_lm.py has written.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = STEPS[PRECISION],
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """One of the two runs, or the table."""
    folder = folder.resolve()
    if what == "table":
        found = {arm: finished(arguments_of(arm, folder, steps)) for arm in ARMS}
        if missing := [arm for arm, result in found.items() if result is None]:
            raise FileNotFoundError(
                f"{folder}: expected results of {steps} steps of both runs, got none of {' and '.join(missing)}."
                " Remedy: bash launch/demo_lm.sh runs them."
            )
        Console(width=None if sys.stdout.isatty() else 120).print(summary(found, folder), highlight=False)  # type: ignore[arg-type]
        return
    args = arguments_of(what, folder, steps)
    check_data(args)
    if finished(args) is not None:
        print(f"The {what} run is there already. To run it again, remove {args.results}")
        return
    from finetune import run
    from processes import processes

    with processes():
        run(args)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()

"""The command `plan`."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ds_childtune.commands.before import ModelClass, outline_facts, outline_json
from ds_childtune.commands.output import AsJson, facts_table, show, show_json, size
from ds_childtune.config import ChildTuningConfig, parse_config
from ds_childtune.planning.check import read_config
from ds_childtune.planning.memory import KINDS, Phase
from ds_childtune.planning.model import ModelOutline, build_without_weights
from ds_childtune.planning.plan import MOST_RANKS, Fit, Plan, Planned, Side
from ds_childtune.planning.run import bytes_of

_DEFAULT = {"mode": "ChildTuning-D", "reserve_p": 0.1, "optimizer_state": "compact", "clip": "child"}
"""The child that is planned where neither --config nor an option says another."""


def plan_command(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or config.json. No weights are read.")],
    stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="ZeRO stage.  [default: the config's, else 3]")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Ranks.")] = 8,
    reserve_p: Annotated[float | None, typer.Option(help="Share of the eligible elements.")] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Of the forward pass.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="For example AdamW, Lion or SGD.")] = None,
    config: Annotated[Path | None, typer.Option(help="DeepSpeed config; options replace its keys.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Patterns of eligible parameters.")] = None,
    others: Annotated[Literal["dense", "frozen"] | None, typer.Option(help="What is not eligible.")] = None,
    optimizer_state: Annotated[Literal["dense", "compact"] | None, typer.Option(help="Of the child.")] = None,
    lean: Annotated[bool, typer.Option("--lean", help="Begin inside lean_start, where it can be used.")] = False,
    fit: Annotated[str | None, typer.Option(help="Memory of a device, for example 80GiB: what fits?")] = None,
    activations: Annotated[str, typer.Option(help="Of --fit, what activations take.")] = "0",
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Plan memory, disk and traffic of plain DeepSpeed and of a child, from configs. Exit code 1 where it does not --fit."""
    budget = None if fit is None else bytes_of(fit) - bytes_of(activations)
    given = {} if config is None else read_config(config)
    given = _with_options(given, stage, dtype, optimizer)
    block = {"reserve_p": reserve_p, "include": include, "others": others, "optimizer_state": optimizer_state}
    child = _child(given.get("child_tuning"), {key: value for key, value in block.items() if value is not None})
    outline = ModelOutline.of(build_without_weights(model, model_class), child)
    planned = Planned(outline, given, child, world_size, lean)
    plan, found = planned.plan(), None if budget is None else planned.fit(budget)
    if as_json:
        show_json(plan_json(plan, found))
    else:
        _show_plan(plan)
        if found is not None and budget is not None:
            show(facts_table(_fit_facts(found, planned, budget)))
    if found is not None and not found.fits:
        raise typer.Exit(1)


def _with_options(given: dict[str, Any], stage: int | None, dtype: str | None, optimizer: str | None) -> dict[str, Any]:
    config = copy.deepcopy(given)
    zero = config.setdefault("zero_optimization", {})
    if stage is not None or "stage" not in zero:
        zero["stage"] = 3 if stage is None else stage
    named = any(isinstance(config.get(key), dict) and config[key].get("enabled") is True for key in ("bf16", "fp16"))
    if dtype is not None or not (named or given):
        for key in ("bf16", "fp16"):
            config[key] = {**config.get(key, {}), "enabled": key == (dtype or "bf16")}
    if optimizer is not None:
        config["optimizer"] = {"type": optimizer, "params": {}}
    return config


def _child(block: object, options: dict[str, Any]) -> ChildTuningConfig:
    given = {**(_DEFAULT if block is None else parse_config(block).model_dump(exclude_unset=True)), **options}
    if given.get("optimizer_state") == "dense" and block is None:
        del given["clip"]
    return parse_config(given)


# ---------------------------------------------------------------- for a program


def plan_json(plan: Plan, fit: Fit | None) -> dict[str, Any]:
    """All sizes in bytes."""
    return {
        "model": outline_json(plan.model),
        "plain": _side_json(plan.plain),
        "child": _side_json(plan.child),
        "fit": None if fit is None else asdict(fit),
    }


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "compact": side.run.parts,
        "stage": side.run.stage,
        "world_size": side.run.world_size,
        "peak": side.peak,
        "phases": {phase.name: _phase_json(phase) for phase in side.phases},
        "checkpoint": side.checkpoint,
        "export": side.export,
        "sent_per_step": dict(side.per_step),
        "sent_per_fisher_batch": side.in_fisher,
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {
        "live": phase.live,
        "peak": phase.peak,
        "kept": dict(phase.kept),
        "moments": dict(phase.moments),
        "host": phase.host,
        "host_peak": phase.host_peak,
    }


# ---------------------------------------------------------------- for a person


def _show_plan(plan: Plan) -> None:
    run = plan.child.run
    facts = outline_facts(plan.model)
    facts["ranks"] = f"{run.world_size:,}, ZeRO-{run.stage}; what is below is of the rank that has most"
    facts["compact"] = run.parts or "nothing"
    show(facts_table(facts))
    show(_memory_table(plan))
    show(_other_table(plan))
    show("Activations are not in these figures, nor what the memory allocator, kernels and libraries keep.")


def _memory_table(plan: Plan) -> Table:
    table = Table("memory of a rank")
    columns = [
        (title, phase) for title, side in (("plain", plan.plain), ("child", plan.child)) for phase in side.phases
    ]
    for title, phase in columns:
        table.add_column(f"{title}: {phase.name}", justify="right")
    for kind in KINDS:
        if any(phase.kept[kind] for _, phase in columns):
            name = "masks or indices" if kind == "child" else kind
            table.add_row(name, *(size(phase.kept[kind]) if phase.kept[kind] else "" for _, phase in columns))
    table.add_section()
    table.add_row("live", *(size(phase.live) for _, phase in columns))
    table.add_row("peak", *(size(phase.peak) for _, phase in columns))
    table.add_row("in which", *(phase.peak_is for _, phase in columns))
    if any(phase.host for _, phase in columns):
        table.add_row("host memory", *(size(phase.host) for _, phase in columns))
        table.add_row("its peak", *(size(phase.host_peak) for _, phase in columns))
    return table


def _other_table(plan: Plan) -> Table:
    table = Table("", show_header=True)
    for column in ("plain", "child"):
        table.add_column(column, justify="right")
    sides = (plan.plain, plan.child)
    table.add_row("a checkpoint, files of all ranks", *(size(side.checkpoint) for side in sides))
    table.add_row("an export", "", size(plan.child.export) if plan.child.export else "none")
    for what in plan.plain.per_step:
        table.add_row(f"sent by a rank in a step: {what}", *(size(side.per_step[what]) for side in sides))
    table.add_row("sent by a rank for a micro-batch of the Fisher pass", "", size(plan.child.in_fisher))
    return table


def _fit_facts(fit: Fit, planned: Planned, budget: int) -> dict[str, str]:
    most = f"none of 1 to {MOST_RANKS:,}"
    return {
        "budget": f"{size(budget)} of a device for all but activations",
        "this plan": "fits" if fit.fits else "does not fit",
        "largest reserve_p": "none" if fit.largest_p is None else f"{fit.largest_p:g}",
        "smallest world size": most if fit.smallest_world_size is None else f"{fit.smallest_world_size:,}",
        "the same, plain": most if fit.plain_smallest_world_size is None else f"{fit.plain_smallest_world_size:,}",
        "best ZeRO stage": f"none at {planned.world_size:,} ranks" if fit.best_stage is None else f"{fit.best_stage}",
    }

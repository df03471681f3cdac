"""Commands for before a run: `check` and `plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ds_childtune.commands.output import AsJson, facts_table, show, show_json
from ds_childtune.planning.check import Checked, check, read_config
from ds_childtune.planning.model import ModelOutline, most_trained

ModelClass = Annotated[
    str | None,
    typer.Option(help="Class of transformers to build, for example AutoModelForSequenceClassification."),
]


def check_command(
    config: Annotated[Path, typer.Argument(help="DeepSpeed config with a child_tuning block.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Hub name, folder, or config.json. No weights are read.")] = None,
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Say what the child_tuning block and the DeepSpeed config do together. Exit code 1 where they are refused."""
    found = check(read_config(config), model, model_class)
    if as_json:
        show_json(checked_json(found))
    else:
        _show_checked(found)
    if not found.works:
        raise typer.Exit(1)


def checked_json(found: Checked) -> dict[str, Any]:
    return {
        "works": found.works,
        "refused": list(found.refused),
        "checkpoints_refused": list(found.checkpoints),
        "config": found.config.model_dump(mode="json"),
        "compact": found.compact,
        "lean_start": found.not_lean is None,
        "lean_start_reason": found.not_lean,
        "keys": [asdict(key) for key in found.keys],
        "auto": list(found.auto),
        "model": None if found.model is None else outline_json(found.model),
    }


def outline_json(outline: ModelOutline) -> dict[str, Any]:
    return {
        "class": outline.model_class,
        "elements": outline.numel,
        "eligible": outline.eligible_numel,
        "kept": outline.kept,
        "trained": outline.trained,
        "trained_share": outline.trained_share,
        "groups": [asdict(group) for group in outline.groups()],
    }


def _show_checked(found: Checked) -> None:
    facts = {"child": f"{found.config.mode}, reserve_p {found.config.reserve_p:g}, selector {found.config.selector}"}
    if found.config.mode == "ChildTuning-F":
        facts["child"] = f"{found.config.mode}, reserve_p {found.config.reserve_p:g}, drawn at every step"
    facts["compact"] = found.compact
    facts["lean_start"] = "can be used" if found.not_lean is None else f"cannot be used: {found.not_lean}"
    if found.model is not None:
        facts |= outline_facts(found.model)
    show(facts_table(facts))
    if found.model is not None:
        show(_group_table(found.model))
    show(_key_table(found))
    if found.auto:
        show(f'"auto", which the Trainer fills in; the default was taken here: {", ".join(found.auto)}')
    for text in (*found.checkpoints, *found.refused):
        show(f"REFUSED: {text}")
    if found.works:
        show("attach takes this config, as far as it can be told from a file.")


def outline_facts(outline: ModelOutline) -> dict[str, str]:
    """Lines about a model."""
    eligible = sum(w.name in outline.eligible for w in outline.weights)
    most = "; ".join(f"{g.kind} {g.trained:,} ({g.trained / outline.trained:.0%})" for g in most_trained(outline))
    return {
        "model": f"{outline.model_class}, {outline.numel:,} elements in {len(outline.weights)} parameters",
        "eligible": f"{outline.eligible_numel:,} elements in {eligible} parameters; the child keeps {outline.kept:,}",
        "trains": f"{outline.trained:,} elements, {outline.trained_share:.2%} of the whole model; most in {most}",
    }


def _group_table(outline: ModelOutline) -> Table:
    table = Table("parameters", "role")
    for column in ("how many", "elements", "train", "share"):
        table.add_column(column, justify="right")
    for group in outline.groups():
        cells = (f"{group.parameters}", f"{group.numel:,}", f"{group.trained:,}", f"{group.share:.1%}")
        table.add_row(group.kind, group.role, *cells)
    return table


def _key_table(found: Checked) -> Table:
    table = Table("key of the DeepSpeed config", "here", "what it does")
    for key in found.keys:
        table.add_row(key.name, key.value, key.effect)
    return table

"""Base model + exported child = tuned model, to the bit; and back."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import ds_childtune
from ds_childtune import __main__ as command_line
from ds_childtune import apply_child, compose, merge
from ds_childtune.child_files.compare import by_layer, compare, total
from ds_childtune.child_files.reader import open_child
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, on_device, train_step
from tests.support.exporting import P, Run, base_model, copied, same, train_and_export
from tests.support.models import batches, block_parameters, build, deal
from tests.support.ranks import RankPool

BERT = Setup("bert", stage=0)
CASES: dict[str, tuple[Setup, str, int, int]] = {
    "stage 0, fp32, 1 rank": (BERT, "dense", 1, 0),
    "another child of the same model": (BERT, "dense", 1, 7),
    "stage 0, bf16": (Setup("odd", stage=0, bf16=True), "compact", 2, 0),
    "stage 1, bf16, tied": (Setup("gpt2", stage=1, bf16=True), "dense", 2, 0),
    "stage 2, fp32, frozen and tied": (Setup("odd", stage=2), "compact", 2, 0),
    "stage 2, bf16, offload": (Setup("odd", stage=2, bf16=True, offload=True), "dense", 2, 0),
    "stage 3, fp32, sub-groups, 4 ranks": (Setup("odd", stage=3, sub_group_size=20), "dense", 4, 0),
    "stage 3, bf16, persistent": (Setup("bert", stage=3, bf16=True, persistence_threshold=20), "compact", 2, 0),
    "stage 3, bf16, zero.Init, tied": (Setup("t5", stage=3, bf16=True, zero_init=True), "dense", 2, 0),
}
"""Set-up, optimizer_state, world size, seed of the data."""

Exported = Callable[[str], tuple[Path, Run]]


@pytest.fixture(scope="module")
def exported(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The folder, and the run, of a case; each is trained once."""
    done: dict[str, tuple[Path, Run]] = {}

    def of(case: str) -> tuple[Path, Run]:
        if case not in done:
            setup, optimizer_state, world_size, seed = CASES[case]
            folder = tmp_path_factory.mktemp("export")
            done[case] = folder, pool[world_size].run(train_and_export, setup, str(folder), optimizer_state, seed)[0]
        return done[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_base_plus_child_is_the_tuned_model(exported: Exported, case: str) -> None:
    folder, run = exported(case)
    setup = CASES[case][0]
    model = base_model(setup)
    base = copied(model)
    assert not same(run.full, base), "vacuous: training changed nothing"
    applied = apply_child(model, folder / "child")
    assert same(copied(model), run.full)
    applied.revert()
    assert same(copied(model), base)

    child = open_child(folder / "child")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(child.stored) == trainable
    for name in trainable:
        assert torch.equal(child.read(name).mask(), run.masks[name].view(-1)), name
    blocks = block_parameters(setup.family, model)
    kept = sum(child.kept(name) for name in blocks)
    assert kept == round(P * sum(base[name].numel() for name in blocks)), "vacuous: the child is not a part"


# ---------------------------------------------------------------- sharded


@dataclass(frozen=True)
class Applied:
    """Model weights and fp32 masters of one rank: before, with the child, and after `revert`."""

    weights: list[Weights]
    masters: list[Weights]


def apply_on_an_engine(setup: Setup, path: str) -> Applied:
    """A forward pass in between, as it gathers persistent parameters."""
    with engine_of(setup) as engine:
        weights, masters = [model_weights(engine)], [master_weights(engine)]
        applied = apply_child(engine, path)
        weights.append(model_weights(engine))
        masters.append(master_weights(engine))
        with torch.no_grad():
            engine(**on_device(engine, batches(setup.family, 1)[0]))
        applied.revert()
        weights.append(model_weights(engine))
        masters.append(master_weights(engine))
        train_step(engine, batches(setup.family, setup.accumulation))
        return Applied(weights, masters)


def apply_without_an_engine(setup: Setup, path: str) -> Applied:
    """A model of only `zero.Init`."""
    with deepspeed.zero.Init(config_dict_or_path=setup.config()):
        model = build(setup.family)
    whole = build(setup.family)
    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
        for mine, theirs in zip(params, whole.parameters(), strict=True):
            mine.copy_(theirs)

    def gathered() -> Weights:
        with deepspeed.zero.GatheredParameters(params):
            return copied(model)

    weights = [gathered()]
    applied = apply_child(model, path)
    weights.append(gathered())
    applied.revert()
    weights.append(gathered())
    return Applied(weights, [])


ONTO = {
    "stage 3 from stage 2": (
        "stage 2, fp32, frozen and tied",
        Setup("odd", stage=3, sub_group_size=20, persistence_threshold=5),
        apply_on_an_engine,
    ),
    "stage 1 from stage 3 at 4 ranks": (
        "stage 3, fp32, sub-groups, 4 ranks",
        Setup("odd", stage=1),
        apply_on_an_engine,
    ),
    "stage 0, bf16": ("stage 0, bf16", Setup("odd", stage=0, bf16=True), apply_on_an_engine),
    "stage 3, bf16, zero.Init": (
        "stage 3, bf16, zero.Init, tied",
        Setup("t5", stage=3, bf16=True, zero_init=True, persistence_threshold=20),
        apply_on_an_engine,
    ),
    "zero.Init without an engine": ("stage 0, bf16", Setup("odd", stage=3, bf16=True), apply_without_an_engine),
}


@pytest.mark.parametrize("case", ONTO)
def test_onto_sharded_weights(pool: RankPool, exported: Exported, case: str) -> None:
    source, setup, act = ONTO[case]
    folder, run = exported(source)
    for rank in pool[2].run(act, setup, str(folder / "child")):
        before, during, after = rank.weights
        assert same(before, copied(base_model(setup)))
        assert same(during, run.full)
        assert same(after, before)
        if rank.masters:
            before, during, after = rank.masters
            # Outside the child they keep their own bits: at ZeRO 0 DeepSpeed has masters of the weights before their rounding.
            expected = {n: torch.where(run.masks[n], run.full[n].float(), before[n]) for n in during}
            assert same(during, expected)
            assert not same(during, before)
            assert same(after, before)


# ---------------------------------------------------------------- saved models


def logits(model: Any) -> Tensor:
    batch = {"input_ids": batches("bert", 1, seed=3)[0]["input_ids"]}
    with torch.no_grad():
        return model.eval()(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ["stage 0, fp32, 1 rank", "stage 3, bf16, persistent"])
def test_a_merged_model_has_the_full_checkpoint_s_logits(exported: Exported, tmp_path: Path, case: str) -> None:
    """The base model is saved in fp32, whatever it was trained in."""
    folder, run = exported(case)
    build("bert").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("a tokenizer's file")
    merge(tmp_path / "base", [folder / "child"], tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    full = base_model(CASES[case][0])
    untuned = logits(full)
    full.load_state_dict(torch.load(folder / "full" / "pytorch_model.bin", weights_only=True))
    assert same(copied(merged), run.full)
    assert torch.equal(logits(merged), logits(full))
    assert not torch.equal(logits(full), untuned), "vacuous"
    assert (tmp_path / "merged" / "vocab.txt").exists()
    with pytest.raises(ValueError, match="expected a new folder"):
        merge(tmp_path / "base", [folder / "child"], tmp_path / "merged")


def test_several_children(exported: Exported, tmp_path: Path) -> None:
    """Both at once, in their order, as one child, and taken off again."""
    paths = [exported(case)[0] / "child" for case in list(CASES)[:2]]
    runs = [exported(case)[1] for case in list(CASES)[:2]]
    model = base_model(BERT)
    base = copied(model)
    expected = {}
    for name, first in runs[0].full.items():
        second_wins = runs[1].masks[name]
        expected[name] = torch.where(second_wins, runs[1].full[name], first)
    assert not same(expected, runs[1].full)

    with pytest.raises(ValueError, match=r"expected no element that .* sets to another value, got .*conflicts"):
        apply_child(model, *paths)
    assert same(copied(model), base)
    applied = apply_child(model, *paths, conflicts="last")
    assert same(copied(model), expected)
    applied.revert()
    assert same(copied(model), base)

    model.save_pretrained(tmp_path / "base")
    compose(tmp_path / "base", paths, tmp_path / "both", conflicts="last")
    apply_child(model, tmp_path / "both")
    assert same(copied(model), expected)
    union = runs[0].masks, runs[1].masks
    for name in open_child(tmp_path / "both").stored:
        assert torch.equal(open_child(tmp_path / "both").read(name).mask(), (union[0][name] | union[1][name]).view(-1))
    # One child does not get onto a model that has another: it is not the base model any more.
    with pytest.raises(ValueError, match="revert other children first"):
        apply_child(model, paths[0])


def test_what_two_children_have_in_common(exported: Exported) -> None:
    cases = list(CASES)[:2]
    one, other = (open_child(exported(case)[0] / "child") for case in cases)
    masks = [exported(case)[1].masks for case in cases]
    overlaps = {o.name: o for o in compare(one, other)}
    for name, overlap in overlaps.items():
        first, second = (m[name] for m in masks)
        counts = [first.numel(), int(first.sum()), int(second.sum()), int((first & second).sum())]
        assert [overlap.numel, overlap.first, overlap.second, overlap.both] == counts
    whole = total("total", overlaps.values())
    assert 0 < whole.equal < whole.both < whole.first, "vacuous"
    layers = {o.name: o for o in by_layer(overlaps.values())}
    layer = [o.both for name, o in overlaps.items() if name.startswith("bert.encoder.layer.1.")]
    assert layers["bert.encoder.layer.1"].both == sum(layer) > 0
    assert compare(one, one)[0].jaccard == 1.0


# ---------------------------------------------------------------- refusals


def test_another_model_is_refused(exported: Exported) -> None:
    """Other names, another dtype, other weights outside the child; other weights inside it are what a child is about."""
    path = exported("stage 0, fp32, 1 rank")[0] / "child"
    run = exported("stage 0, fp32, 1 rank")[1]
    name = "bert.encoder.layer.0.output.dense.weight"

    def check(model: nn.Module, *words: str) -> None:
        before = copied(model)
        with pytest.raises(ValueError, match="Remedy") as caught:
            apply_child(model, path)
        for word in (str(path), *words):
            assert word in str(caught.value)
        assert same(copied(model), before)

    check(build("odd"), "the same parameters")
    check(build("bert").to(torch.bfloat16), "float32, but the model has", "bfloat16")
    inside = run.masks[name].view(-1)
    model = build("bert")
    weights = model.get_parameter(name).data.view(-1)
    weights[inside] += 1
    apply_child(model, path).revert()
    weights[int(torch.nonzero(~inside)[3])] += 1e-3
    check(model, "1 of", name, "other values")
    with pytest.raises(ValueError, match=r"expected an nn\.Module"):
        apply_child(7, path)
    with pytest.raises(ValueError, match="at least one child"):
        apply_child(model)


@contextmanager
def little_files(*, on_this_rank: bool) -> Iterator[None]:
    """As if the disk were full: the nearest that a process can do to itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if on_this_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusals(path: str) -> list[str]:
    """What `export` and `apply_child` say where they cannot be right."""
    texts = []
    setup = Setup("odd", stage=2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = deal(batches("odd", 2), rank, world_size)

    def refused(act: Callable[[], Any]) -> None:
        try:
            act()
            texts.append("nothing")
        except (NotImplementedError, RuntimeError) as error:
            texts.append(f"{type(error).__name__}: {error}")

    for block in (
        {"mode": "ChildTuning-F", "reserve_p": P},
        {"mode": "ChildTuning-D", "reserve_p": P, "compat": "original"},
        {"mode": "ChildTuning-D", "reserve_p": P},
    ):
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, block)
            if block["mode"] == "ChildTuning-D":
                refused(lambda child=child: child.export(path))  # type: ignore[misc]
                child.select(share)
            if len(block) == 2 and block["mode"] == "ChildTuning-D":
                child.select(share)  # chosen anew before a step: nothing has moved
                child.export(path)
                train_step(engine, share)
                refused(lambda child=child: child.export("/proc/child"))  # type: ignore[misc]
                with little_files(on_this_rank=rank == 1):
                    refused(lambda child=child: child.export(path))  # type: ignore[misc]
                train_step(engine, share)
                child.select(share)
                refused(lambda engine=engine: apply_child(engine, path))  # type: ignore[misc]
            refused(lambda child=child: child.export(path))  # type: ignore[misc]
    return texts


def test_what_cannot_be_exported(pool: RankPool, tmp_path: Path) -> None:
    ranks = pool[2].run(refusals, str(tmp_path / "child"))
    assert ranks[0] == ranks[1]
    expected = [
        ("NotImplementedError", "ChildTuning-F", "moves every element"),
        ("RuntimeError", "no child yet"),
        ("NotImplementedError", 'compat "original"', "moves every element"),
        ("RuntimeError", "no child yet"),
        ("RuntimeError", "[rank 0] expected to write /proc/child"),
        ("RuntimeError", f"[rank 1] expected to write {tmp_path}", "File too large"),
        ("RuntimeError", "trains a child", "detach() first"),
        ("NotImplementedError", "after another one had been trained"),
    ]
    for text, words in zip(ranks[0], expected, strict=True):
        assert all(word in text for word in words), text
    # The child of before the failures is still there.
    assert open_child(tmp_path / "child").manifest.extra["step"] == 0


# ---------------------------------------------------------------- the command line


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ds_childtune", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return int(ended.value.code or 0)


def test_the_command_line(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (exported(case)[0] / "child" for case in list(CASES)[:2])
    build("bert").save_pretrained(tmp_path / "base")
    assert run_command(monkeypatch, "inspect", one, "--parameters") == 0
    shown = capsys.readouterr().out
    for word in ("ChildTuning-D", "BertForSequenceClassification", "classifier.weight", "3 steps"):
        assert word in shown
    assert run_command(monkeypatch, "compare", one, other) == 0
    assert "bert.encoder.layer.1" in capsys.readouterr().out
    base, both = tmp_path / "base", ("--output", tmp_path / "both", "--conflicts", "last")
    assert run_command(monkeypatch, "compose", base, one, other, *both) == 0
    assert run_command(monkeypatch, "merge", base, tmp_path / "both", "-o", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    capsys.readouterr()
    for wrong in (("inspect", tmp_path), ("merge", tmp_path / "none", one, "-o", tmp_path / "new")):
        assert run_command(monkeypatch, *wrong) == 1
        shown = capsys.readouterr().err
        assert "Remedy" in shown
        assert "Traceback" not in shown
    assert not (tmp_path / "new").exists()

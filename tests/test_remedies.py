"""Every remedy that an error of checkpoints and child files names, taken at its word: the error first, then what it says to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_childtune
from ds_childtune import apply_child, compose, merge
from ds_childtune.child_files.compare import compare
from ds_childtune.child_files.export_info import describe, parameter_entries
from ds_childtune.child_files.fingerprint import fingerprint
from ds_childtune.child_files.format import Manifest, Piece, parse, seal
from ds_childtune.child_files.reader import open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.engines import Setup, engine_of, master_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

# ---------------------------------------------------------------- only the child


def line(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(6, 4, bias=False)


def export(folder: Path, model: nn.Module, inside: dict[str, Tensor], more: float = 1.0, what: str = "values") -> Path:
    """A child of `model` whose elements are larger by `more`."""
    folder.mkdir(parents=True)
    base = {name: p.detach().view(-1) for name, p in model.named_parameters()}
    pieces = [Piece.of(n, 0, mask, **{what: torch.where(mask, base[n] + more, base[n])}) for n, mask in inside.items()]
    file = write_pieces(folder, 0, pieces)
    assert file is not None
    extra = describe(model, {n: fingerprint(values, 0, inside.get(n)) for n, values in base.items()}, 1)
    write_manifest(folder, seal(Manifest("0", "export", {}, parameter_entries(model, inside), (file,), extra)))
    return folder


def some(step: int) -> dict[str, Tensor]:
    return {"weight": torch.arange(24) % step == 0}


def test_apply(tmp_path: Path) -> None:
    one, other = export(tmp_path / "one", line(), some(3)), export(tmp_path / "other", line(), some(4), more=2.0)
    model = line()

    def refused(text: str, target: Any, *paths: Path, **options: Any) -> None:
        before = model.weight.detach().clone()
        with pytest.raises((ValueError, NotImplementedError), match=f"(?s)Remedy: .*{text}"):
            apply_child(target, *paths, **options)
        assert torch.equal(model.weight, before)

    refused("pass its path", model)
    refused("pass the base model", 7, one)
    refused('pass one of "refuse" and "last"', model, one, conflicts="first")
    refused("on the model that it was trained on|to the model that it was trained on", nn.Linear(6, 4), one)
    refused("in the same dtype", line().bfloat16(), one)
    refused("call contiguous", model_with_strides(), one)
    for conflicts in ("refuse", "last"):
        apply_child(model, one, conflicts=conflicts).revert()  # type: ignore[arg-type]
    apply_child(contiguous(model_with_strides()), one)

    applied = apply_child(model, one)
    refused("revert other children first, or apply all in one call", model, other)
    applied.revert()
    apply_child(model, other).revert()
    refused('pass conflicts="last"', model, one, other)
    both = apply_child(model, one, other, conflicts="last")
    base = line().weight.detach().view(-1)
    expected = base + some(3)["weight"] * 1.0
    expected = torch.where(some(4)["weight"], base + 2, expected)
    assert torch.equal(model.weight.view(-1), expected)
    both.revert()

    strange = export(tmp_path / "strange", line(), some(3), what="others")
    refused("export it again", model, strange)
    shutil.rmtree(strange)
    apply_child(model, export(strange, line(), some(3)))


def model_with_strides() -> nn.Module:
    model = line()
    model.weight.data = model.weight.data.t().contiguous().t()
    return model


def contiguous(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


def test_reading(tmp_path: Path) -> None:
    folder = export(tmp_path / "child", line(), some(3))
    whole = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="give the folder that was written"):
        open_child(tmp_path)
    with pytest.raises(ValueError, match="give the folder of another child"):
        open_child(folder, kind="checkpoint")
    with pytest.raises(ValueError, match="use a child of this model"):
        open_child(folder).read("bias")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="take an undamaged copy"):
        open_child(folder)
    assert open_child(whole, kind="export").kept("weight") == 8

    data = json.loads((whole / "child.json").read_text())
    (whole / "child.json").write_text(json.dumps(data | {"version": 9}))
    with pytest.raises(ValueError, match="or write it again"):
        open_child(whole)
    shutil.rmtree(whole)
    export(whole, line(), some(3))
    assert open_child(whole).kept("weight") == 8

    wide = export(tmp_path / "wide", nn.Linear(7, 4, bias=False), {"weight": torch.ones(28).bool()})
    with pytest.raises(ValueError, match="compare children of one base model"):
        compare(open_child(whole), open_child(wide))
    assert compare(open_child(whole), open_child(export(tmp_path / "other", line(), some(4))))[0].both == 2

    odd = line()
    odd.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match="convert it"):
        parameter_entries(odd, [])
    odd.phase = torch.view_as_real(odd.phase)
    assert len(parameter_entries(odd, [])) == 2


def test_merge_and_compose(tmp_path: Path) -> None:
    bert = build("bert")
    inside = {n: torch.arange(p.numel()) % 3 == 0 for n, p in bert.named_parameters() if "layer.0" in n}
    child = export(tmp_path / "child", bert, inside)
    base = tmp_path / "base"
    bert.save_pretrained(base)  # type: ignore[operator]
    for act in (merge, compose):
        with pytest.raises(ValueError, match="pass its path"):
            act(base, [], tmp_path / "none")
        for one in (child, str(child)):
            with pytest.raises(
                ValueError, match=r"expected a list of children's folders, got .*child.* pass \['.*child'\]"
            ):
                act(base, one, tmp_path / "none")  # type: ignore[operator]
    with pytest.raises(ValueError, match="give the folder or hub name of the child's base model"):
        merge(tmp_path / "nowhere", [child], tmp_path / "merged")
    merge(base, [child], tmp_path / "merged")
    with pytest.raises(ValueError, match="remove it, or write elsewhere"):
        merge(base, [child], tmp_path / "merged")
    merge(base, [child], tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "merged")
    merge(base, [child], tmp_path / "merged")

    unknown = json.loads((child / "child.json").read_text())
    unknown["extra"]["model_class"] = "MyOwnModel"
    (child / "child.json").write_bytes(seal(parse(Manifest, json.dumps(unknown), "")).json())
    with pytest.raises(ValueError, match=r"build the base model yourself, and call ds_childtune\.apply_child"):
        merge(base, [child], tmp_path / "again")
    applied = apply_child(build("bert"), child)
    assert "tensor" not in repr(applied), "a notebook would print every weight"


# ---------------------------------------------------------------- checkpoints

ODD = Setup("odd", stage=2)
D_COMPACT = BLOCKS["D-compact"]


def mine(seed: int) -> list[Any]:
    return deal(batches("odd", 2, seed=seed), dist.get_rank(), dist.get_world_size())


def refused(text: str, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as error:
        act(*args, **kwargs)
    assert text in str(error.value), error.value


def saving(folder: str) -> None:
    """What `save_checkpoint` refuses, and what it says to do."""
    with engine_of(ODD) as engine:
        child = ds_childtune.attach(engine, D_COMPACT)
        child.select(mine(0))
        train_step(engine, mine(1))
        refused("Remedy: name one, or any new path", engine.save_checkpoint, "")
        assert engine.save_checkpoint(folder, "named")
        refused('Remedy: pass for example tag="step100"', engine.save_checkpoint, folder, "../out")
        assert engine.save_checkpoint(folder, tag="step100")
        refused("client_state can be pickled", engine.save_checkpoint, folder, "bad", client_state={"no": lambda: 0})
        assert engine.save_checkpoint(folder, "good", client_state={"yes": 1})
        policy: Any = child._hooks.child
        counters = policy.optimizer.state[next(iter(policy.shards.values())).tensor]
        counters["scale"] = torch.tensor(float("nan"))  # as Adafactor's of a shard without elements
        refused('Remedy: use optimizer_state "dense"', engine.save_checkpoint, folder, "lost")
        del counters["scale"]
        below = Path(folder) / "a file"
        dist.barrier()
        below.touch()
        refused("choose a path whose parents are folders", engine.save_checkpoint, str(below / "x"), "good")
        assert engine.save_checkpoint(str(Path(folder) / "a folder" / "x"), "good")
        engine.module.extra = nn.Parameter(torch.zeros(3))
        refused("Remedy: call detach() and attach(engine) again", engine.save_checkpoint, folder, "changed")
        child.detach()
        child = ds_childtune.attach(engine, D_COMPACT)
        child.select(mine(0))
        train_step(engine, mine(1))
        assert engine.save_checkpoint(folder, "changed")
        child.detach()
    for key, extra in {
        "checkpoint.use_node_local_storage": {"checkpoint": {"use_node_local_storage": True}},
        "zero_optimization.elastic_checkpoint": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
    }.items():
        with engine_of(ODD, **extra) as engine:
            ds_childtune.attach(engine, BLOCKS["F"])
            refused(key, engine.save_checkpoint, folder, "never")


def test_saving(pool: RankPool, tmp_path: Path) -> None:
    pool[2].run(saving, str(tmp_path))
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "lost").exists()


def other_engine(extra: bool = False, freeze: str = "") -> Any:
    """Of the odd model, with a parameter more, or with one frozen."""
    model = build("odd")
    if extra:
        model.extra = nn.Parameter(torch.full((3,), 7.0))
    if freeze:
        model.get_parameter(freeze).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=ODD.config())[0]


def loading(folder: str) -> None:
    """What `load_checkpoint` refuses, and what it says to do; `folder` has the tags older and newer, and another with it damaged."""
    saved = {}
    with engine_of(ODD) as engine:
        child = ds_childtune.attach(engine, D_COMPACT)
        child.select(mine(0))
        for tag in ("older", "newer"):
            train_step(engine, mine(1))
            engine.save_checkpoint(folder, tag)
            saved[tag] = master_weights(engine)
    latest, damaged = Path(folder) / "latest", Path(folder) / "newer" / "child" / "rank-00001.safetensors"

    def rank_0(act: Callable[[], Any]) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            act()
        dist.barrier()

    def loaded(engine: Any, expected: str, tag: str | None = None) -> None:
        engine.load_checkpoint(folder, tag)
        assert equal_bits(master_weights(engine), saved[expected])

    with engine_of(ODD) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        refused(
            "Remedy: pass the tag of a checkpoint that is there; the last ones are newer, older",
            engine.load_checkpoint,
            folder,
            "no",
        )
        loaded(engine, "newer", "newer")
    with engine_of(ODD) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        rank_0(lambda: latest.write_bytes(b"\xff\xfe"))
        refused("Remedy: write the name of a checkpoint's folder into it, or pass tag=", engine.load_checkpoint, folder)
        loaded(engine, "older", tag="older")
        rank_0(lambda: latest.write_text("newer"))
    with engine_of(ODD) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        loaded(engine, "newer")
        refused("Remedy: set the same bf16 or fp16", ds_of_bf16, folder)
    for options, text in (
        ({"freeze": "blocks.1.gain"}, "Remedy: freeze the same parameters"),
        ({"extra": True}, "Remedy: build the same model"),
    ):
        engine = other_engine(**options)  # type: ignore[arg-type]
        ds_childtune.attach(engine, D_COMPACT)
        refused(text, engine.load_checkpoint, folder)
        engine.load_checkpoint(folder, load_module_only=True, load_module_strict="extra" not in options)
        got = master_weights(engine)
        assert equal_bits(
            {n: got[n] for n in got.keys() & saved["newer"].keys()}, {n: saved["newer"][n] for n in got if n != "extra"}
        )
        assert "extra" not in options or bool((engine.module.extra == 7).all())
        engine.destroy()
    rank_0(lambda: damaged.write_bytes(damaged.read_bytes()[:-1]))
    with engine_of(ODD) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        refused("newest first: older; load one with tag=", engine.load_checkpoint, folder)
        loaded(engine, "older", tag="older")


def ds_of_bf16(folder: str) -> None:
    with engine_of(replace(ODD, bf16=True)) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        engine.load_checkpoint(folder)


def test_loading(pool: RankPool, tmp_path: Path) -> None:
    pool[2].run(loading, str(tmp_path))

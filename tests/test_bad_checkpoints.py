"""Checkpoints that are damaged, of something else, or cannot be written: a readable error, on every rank, and training goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.engines import Setup, engine_of, master_weights, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool

ODD = Setup("odd", stage=2)
D_COMPACT, F = BLOCKS["D-compact"], BLOCKS["F"]
TAG = "good"


def mine(setup: Setup, seed: int) -> list[Any]:
    ranks = dist.get_world_size()
    return deal(batches(setup.family, ranks, seed=seed), dist.get_rank(), ranks)


def attached(engine: Any, setup: Setup, block: dict[str, Any]) -> Any:
    child = ds_childtune.attach(engine, block)
    if child.config.mode == "ChildTuning-D":
        child.select(mine(setup, 1000))
    return child


def write(setup: Setup, block: dict[str, Any], folder: str) -> None:
    with engine_of(setup) as engine:
        attached(engine, setup, block)
        for step in range(2):
            train_step(engine, mine(setup, step))
        engine.save_checkpoint(folder, TAG)


@dataclass(frozen=True)
class Refusal:
    kind: str
    text: str
    untouched: bool
    """Weights are as before."""


def load_each(
    setup: Setup, block: dict[str, Any], folders: list[str], select: bool = False, **options: Any
) -> list[Refusal | None]:
    """Try to load every one of the folders, in one engine."""
    outcomes: list[Refusal | None] = []
    with engine_of(setup) as engine:
        child = attached(engine, setup, block) if select else ds_childtune.attach(engine, block)
        before = master_weights(engine)
        for folder in folders:
            try:
                engine.load_checkpoint(folder, **options)
            except (ValueError, RuntimeError) as error:
                outcomes.append(Refusal(type(error).__name__, str(error), equal_bits(before, master_weights(engine))))
            else:
                outcomes.append(None)
        child.detach()
    return outcomes


def check(outcomes: list[list[Refusal | None]], words: list[list[str]]) -> None:
    """The same refusal on every rank, with these words in it, and an engine as it was."""
    for case, expected in zip(zip(*outcomes, strict=True), words, strict=True):
        for refusal in case:
            assert refusal is not None, f"no error for {expected}"
            assert refusal == case[0]
            assert refusal.untouched
            assert "Remedy" in refusal.text
            for word in expected:
                assert word in refusal.text, refusal.text


@pytest.fixture(scope="module")
def good(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    pool[2].run(write, ODD, D_COMPACT, str(folder))
    pool[2].run(write, ODD, D_COMPACT, str(folder / "other"))
    shutil.move(folder / "other" / TAG, folder / "older")
    return folder


# ---------------------------------------------------------------- damage

FILES = ["child/child.json", "child/child-00001-*", "child/rank-00000*", "zero_pp_rank_1_*", "mp_rank_00_*"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    """One bit, of a byte that depends on the folder, as manifests are damaged in several places."""
    data = bytearray(path.read_bytes())
    data[zlib.crc32(path.parents[2].name.encode()) % len(data)] ^= 0x01
    path.write_bytes(bytes(data))


def test_damaged_files(pool: RankPool, good: Path, tmp_path: Path) -> None:
    folders, words = [], []
    for damage in (truncate, flip, Path.unlink):
        for pattern in FILES if damage is not flip else [*FILES, *FILES[:1] * 8]:
            folder = tmp_path / f"{damage.__name__}-{len(folders)}"
            shutil.copytree(good, folder)
            (path,) = (folder / TAG).glob(pattern)
            damage(path)
            folders.append(str(folder))
            words.append(["is not whole", "child" if "child.json" in pattern else path.name, "older"])
    check(pool[2].run(load_each, ODD, D_COMPACT, folders), words)


def test_another_format_version(pool: RankPool, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    manifest = folder / TAG / "child" / "child.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
    check(pool[2].run(load_each, ODD, D_COMPACT, [str(folder)]), [["is not whole", "version 1 or 2", "version 3"]])


def test_latest_names_nothing(pool: RankPool, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    (folder / "latest").write_text("gone")
    check(pool[2].run(load_each, ODD, D_COMPACT, [str(folder)]), [["gone", "older", "good"]])


# ---------------------------------------------------------------- of something else


@pytest.mark.parametrize(
    ("setup", "changes", "words"),
    [
        (ODD, {"reserve_p": 0.4}, ["child_tuning.reserve_p", "0.3", "0.4"]),
        (ODD, {"optimizer_state": "dense"}, ["child_tuning.optimizer_state", "'compact'", "'dense'"]),
        (ODD, {"exclude": ["*.gain"]}, ["child_tuning.exclude", "*.gain"]),
        (replace(ODD, bf16=True), {}, ["float32", "bfloat16"]),
        (replace(ODD, family="gpt2"), {}, ["no such parameter", "blocks."]),
        (replace(ODD, stage=3, no_decay=("bias",)), {}, ["1 param groups", "got 2"]),
    ],
    ids=["reserve_p", "optimizer_state", "exclude", "precision", "model", "param groups"],
)
def test_of_something_else(pool: RankPool, good: Path, setup: Setup, changes: dict[str, Any], words: list[str]) -> None:
    check(pool[2].run(load_each, setup, D_COMPACT | changes, [str(good)]), [words])


def test_of_the_other_mode(pool: RankPool, good: Path) -> None:
    check(pool[2].run(load_each, ODD, F, [str(good)]), [["child_tuning.mode", "ChildTuning-D", "ChildTuning-F"]])


def test_weights_alone_under_a_fixed_child(pool: RankPool, good: Path) -> None:
    words = ["only weights", "before child.select()"]
    check(pool[2].run(load_each, ODD, D_COMPACT, [str(good)], select=True, load_module_only=True), [words])


def write_plain(setup: Setup, folder: str) -> None:
    with engine_of(setup) as engine:
        train_step(engine, mine(setup, 0))
        engine.save_checkpoint(folder)


def test_plain_deepspeed_s_under_a_fixed_child(pool: RankPool, tmp_path: Path) -> None:
    pool[2].run(write_plain, ODD, str(tmp_path))
    check(pool[2].run(load_each, ODD, D_COMPACT, [str(tmp_path)], select=True), [["has no child"]])
    assert pool[2].run(load_each, ODD, D_COMPACT, [str(tmp_path)]) == [[None]] * 2


def go_on_from_plain(setup: Setup, folder: str) -> tuple[int, int]:
    """A child that begins on weights that plain DeepSpeed has trained; its own steps, and DeepSpeed's."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, F)
        engine.load_checkpoint(folder)
        train_step(engine, mine(setup, 1))
        train_step(engine, mine(setup, 2))
        return child.step, engine.global_steps


def test_a_child_begins_on_a_plain_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    pool[2].run(write_plain, ODD, str(tmp_path))
    assert pool[2].run(go_on_from_plain, ODD, str(tmp_path)) == [(2, 3)] * 2


def plain_weights_at_zero_three(folder: str) -> tuple[list[str], list[bool]]:
    """What is refused, and whether each of the remedies brings the weights that were asked for."""
    setup = replace(ODD, stage=3)
    weights, said, right = {}, [], []
    with engine_of(setup) as engine:
        for step, tag in enumerate((TAG, "last")):
            train_step(engine, mine(setup, step))
            engine.save_checkpoint(folder, tag)
            weights[tag] = master_weights(engine)
    with engine_of(setup) as engine:
        ds_childtune.attach(engine, F)
        refused: list[tuple[str, dict[str, bool]]] = [
            ("last", {"load_module_only": True}),
            (TAG, {"load_optimizer_states": False}),
        ]
        for tag, options in refused:
            with pytest.raises(NotImplementedError) as error:
                engine.load_checkpoint(folder, tag, **options)
            said.append(str(error.value))
        for tag in ("last", TAG):
            dist.barrier()
            if dist.get_rank() == 0:
                (Path(folder) / "latest").write_text(tag)
            dist.barrier()
            engine.load_checkpoint(folder, tag, load_optimizer_states=False)
            right.append(equal_bits(master_weights(engine), weights[tag]))
    return said, right


def test_plain_weights_alone_are_not_lost_at_zero_three(pool: RankPool, tmp_path: Path) -> None:
    """Plain DeepSpeed loads nothing there, or the weights of another tag."""
    for said, right in pool[2].run(plain_weights_at_zero_three, str(tmp_path)):
        assert "Remedy: pass load_optimizer_states=False" in said[0]
        assert f"Remedy: write {TAG} into {tmp_path / 'latest'}" in said[1]
        assert right == [True, True]


def detach_attach_and_load(setup: Setup, folder: str) -> tuple[str, bool]:
    """The remedy of a refusal under a chosen child."""
    with engine_of(setup) as engine:
        child = attached(engine, setup, D_COMPACT)
        with pytest.raises(RuntimeError) as error:
            engine.load_checkpoint(folder, TAG, load_module_only=True)
        child.detach()
        ds_childtune.attach(engine, D_COMPACT)
        before = master_weights(engine)
        engine.load_checkpoint(folder, TAG, load_module_only=True)
        return str(error.value), equal_bits(before, master_weights(engine))


def test_weights_alone_after_detach_and_attach(pool: RankPool, good: Path) -> None:
    for said, same in pool[2].run(detach_attach_and_load, replace(ODD, stage=3), str(good)):
        assert "call detach() and attach(engine) first" in said
        assert not same


def load_two(folders: list[str]) -> str:
    with engine_of(ODD) as engine:
        ds_childtune.attach(engine, D_COMPACT)
        try:
            engine.load_checkpoint(folders[dist.get_rank()])
        except ValueError as error:
            return str(error)
    return "no error"


def test_ranks_that_ask_for_different_checkpoints(pool: RankPool, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "copy")
    for text in pool[2].run(load_two, [str(good), str(tmp_path / "copy")]):
        assert "same on every rank" in text


# ---------------------------------------------------------------- what cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages; where it may not be mounted, the test is skipped, and the next one stands in for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def save_in_vain(block: dict[str, Any], good_folder: str, bad_folder: str, limited: bool) -> tuple[str, bool, int]:
    """A save that fails, between steps that must not notice. The error, whether weights are as without it, child.step.

    Args:
        limited: on rank 1 no file may grow beyond 2 KiB meanwhile.
    """
    ends, text, steps = [], "no error", 0
    for fails in (False, True):
        torch.manual_seed(0)
        with engine_of(replace(ODD, dropout=0.1)) as engine:
            child = attached(engine, ODD, block)
            train_step(engine, mine(ODD, 0))
            engine.save_checkpoint(good_folder, "old")
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if fails:
                try:
                    if limited and dist.get_rank() == 1:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
                    engine.save_checkpoint(bad_folder, "new")
                except RuntimeError as error:
                    text = str(error)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)
            for step in (1, 2):
                train_step(engine, mine(ODD, step))
            ends.append(master_weights(engine))
            steps = child.step
    return text, equal_bits(*ends), steps


def check_failure(outcomes: list[tuple[str, bool, int]], words: list[str]) -> None:
    for text, same, steps in outcomes:
        assert text == outcomes[0][0]
        assert "Remedy" in text
        assert all(word in text for word in words), text
        assert same, "the failed save has changed the training"
        assert steps == 3


def loads(pool: RankPool, folder: Path, block: dict[str, Any], tag: str) -> bool:
    return pool[2].run(load_each, replace(ODD, dropout=0.1), block, [str(folder)], tag=tag) == [[None]] * 2


def test_a_full_disk(pool: RankPool, small_disk: Path) -> None:
    good_folder = small_disk.parent / "good"
    check_failure(
        pool[2].run(save_in_vain, D_COMPACT, str(good_folder), str(small_disk), False),
        ["expected to write", ".new.child-partial"],
    )
    assert not list(small_disk.glob(".*")), "the half is left behind, and the disk full"
    assert loads(pool, good_folder, D_COMPACT, "old")


def test_a_rank_that_cannot_write(pool: RankPool, tmp_path: Path) -> None:
    """Beside an older checkpoint of the same folder, which `latest` goes on naming."""
    outcomes = pool[2].run(save_in_vain, F, str(tmp_path), str(tmp_path), True)
    check_failure(outcomes, ["[rank 1]"])
    assert (tmp_path / "latest").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["old"]
    assert loads(pool, tmp_path, F, "old")


def test_an_unwritable_path(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    outcomes = pool[2].run(save_in_vain, D_COMPACT, str(tmp_path / "good"), str(tmp_path / "file" / "below"), False)
    check_failure(outcomes, ["file", "parents are folders"])


def save_wrongly(act: Callable[[Any], Any], folder: str) -> str:
    with engine_of(ODD) as engine:
        attached(engine, ODD, D_COMPACT)
        try:
            act(engine)
            engine.save_checkpoint(folder, f"rank{dist.get_rank()}" if act is by_rank else None)
        except (ValueError, RuntimeError) as error:
            return str(error)
    return "no error"


def add_one(engine: Any) -> None:
    engine.module.extra = torch.nn.Parameter(torch.zeros(3))


def by_rank(engine: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (add_one, ["extra", "attach"]),
        (by_rank, ["save_dir and tag", "rank0", "rank1"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_saving_what_is_not_what_it_was(
    pool: RankPool, act: Callable[[Any], Any], words: list[str], tmp_path: Path
) -> None:
    for text in pool[2].run(save_wrongly, act, str(tmp_path)):
        assert all(word in text for word in [*words, "Remedy"]), text
    assert not os.listdir(tmp_path)

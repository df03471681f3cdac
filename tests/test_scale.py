"""Many ranks, in one process: what a rank opens and reads does not grow with their number, and every element is found all the same."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import ds_childtune
from ds_childtune import apply_child
from ds_childtune.checkpoint.child import read_masks
from ds_childtune.child_files import places
from ds_childtune.child_files.checksums import blake2b
from ds_childtune.child_files.compare import compare
from ds_childtune.child_files.export_info import describe, parameter_entries
from ds_childtune.child_files.fingerprint import fingerprint
from ds_childtune.child_files.format import (
    ChildFileError,
    FileEntry,
    Manifest,
    ParameterEntry,
    Piece,
    PieceEntry,
    adapter,
    seal,
)
from ds_childtune.child_files.header import Header, read_header
from ds_childtune.child_files.holders import Held, Holders, HoldersByRank, Run, ranks_with
from ds_childtune.child_files.rank_holders import gather_holders
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.checkpoint_write import _with_own_storage
from tests.benchmarks import scale
from tests.support.engines import Setup, engine_of
from tests.support.ranks import RankPool

NAMES = [f"h.{i}.weight" for i in range(5)]


@pytest.mark.parametrize("case", ["load, same shape", "load, half the ranks"])
def test_a_load_opens_as_many_files_whatever_the_number_of_ranks(case: str, tmp_path: Path) -> None:
    function, _ = scale.CASES[case]
    opens = {}
    for world_size in (8, 96):
        folder = tmp_path / str(world_size)
        # The files of two ranks; were another one opened, it would not be there.
        scale.write_checkpoint(folder, NAMES, world_size, [world_size - 2, world_size - 1])
        with scale.counting_opens(folder) as counted:
            function(folder, NAMES, world_size)
        opens[world_size] = counted.count
    assert opens[8] == opens[96]
    assert 4 <= opens[8] <= 12, "vacuous: opens are not counted, or there are many"


def test_a_manifest_stays_small(tmp_path: Path) -> None:
    """The holders of a thousand ranks take as many bytes as those of eight, except for the digits of their numbers."""
    sizes = []
    for world_size in (8, 1000):
        entries = tuple(ParameterEntry(name, (8 * world_size,), "float32", True) for name in NAMES)
        bare = Manifest("0", "export", {}, entries, ())
        held = bare.with_holders(Holders.of([Held(0, 8, 8)] * len(NAMES)))
        sizes.append(len(held.json()) - len(bare.json()))
    assert sizes[0] == sizes[1] < 40 * len(NAMES) + 80


def test_reading_a_whole_model_parses_every_header_once(tmp_path: Path) -> None:
    """Parameter after parameter, too, as long as their pieces fit into what is remembered."""
    scale.write_export(tmp_path / "child", NAMES, 40)
    parsed: list[str] = []

    def counted(folder: Path, file: FileEntry) -> Header:
        parsed.append(file.name)
        return read_header(folder, file)

    with mock.patch.object(places, "read_header", counted):
        child = open_child(tmp_path / "child", checksums=False)
        assert not parsed, "the headers are read before anybody asks for them"
        at_once = child.read_runs([child.whole(name) for name in NAMES])
        one_by_one = [child.read(name) for name in NAMES]
    assert len(parsed) == len(set(parsed)) == 40
    for a, b in zip(at_once, one_by_one, strict=True):
        assert a.kept == scale.KEPT * 40
        assert torch.equal(a.mask(), b.mask())


# ---------------------------------------------------------------- holders


def brute_force(held: Held, numel: int, ranks: int) -> list[int]:
    """The rank of every element, counted off one by one."""
    owners: list[int] = []
    for rank in range(held.first, ranks):
        owners += [rank] * (held.head if rank == held.first else held.each)
    return owners[:numel]


@pytest.mark.parametrize("held", [Held(0, 10, 0), Held(3, 4, 3), Held(0, 1, 1), Held(2, 3, 7), Held(5, 10, 2)])
def test_holders_are_found_as_by_counting(held: Held) -> None:
    numel, ranks = 10, 12
    owners = brute_force(held, numel, ranks)
    assert len(owners) == numel
    for rank in range(ranks):
        start, end = held.run_of(rank, numel)
        assert [i for i, owner in enumerate(owners) if owner == rank] == list(range(start, end))
    for start in range(numel):
        for end in range(start + 1, numel + 1):
            found = [(rank, i) for rank, a, b in held.ranks(start, end, numel) for i in range(a, b)]
            assert found == [(owners[i], i) for i in range(start, end)]
            assert ranks_with(Holders.of([held]), {"w": numel}, [Run("w", start, end)]) == sorted(
                set(owners[start:end])
            )
    counts = HoldersByRank(Holders.of([held, Held(1, 4, 4)]), [numel, 8], [True, True])
    assert [counts.count(rank) for rank in range(ranks)] == [
        (rank in owners) + (rank in (1, 2)) for rank in range(ranks)
    ]


Owned = list[tuple[str, int, int]]
LAYOUTS: dict[str, tuple[list[Owned], tuple[Held, ...] | None]] = {
    "even": ([[("a", 0, 5)], [("a", 5, 5)], [("a", 10, 2)], []], (Held(0, 5, 5), Held(0, 0, 0))),
    "slices": ([[], [("a", 0, 2)], [("a", 2, 10), ("b", 0, 1)], [("b", 1, 6)]], (Held(1, 2, 10), Held(2, 1, 6))),
    "nobody has b": ([[("a", 0, 12)], [], [], []], (Held(0, 12, 0), Held(0, 0, 0))),
    "twice on a rank": ([[("a", 0, 5), ("a", 5, 7)], [], [], []], None),
    "with a hole": ([[("a", 0, 5)], [("a", 6, 6)], [], []], None),
    "in another order": ([[("a", 6, 6)], [("a", 0, 6)], [], []], None),
    "uneven in the middle": ([[("a", 0, 5)], [("a", 5, 3)], [("a", 8, 4)], []], None),
    "a rank left out": ([[("a", 0, 6)], [], [("a", 6, 6)], []], None),
    "not to its end": ([[("a", 0, 6)], [("a", 6, 3)], [], []], None),
}
"""What each of four ranks holds, of "a" of 12 elements and "b" of 7; and what is then said."""


def gathered(layouts: Sequence[list[Owned]]) -> list[Holders | None]:
    deepspeed.init_distributed(verbose=False)
    return [gather_holders({"a": 12, "b": 7}, owned[dist.get_rank()]) for owned in layouts]


def test_ranks_agree_on_holders_or_say_none(pool: RankPool) -> None:
    for said in pool[4].run(gathered, [owned for owned, _ in LAYOUTS.values()]):
        for (name, (_, expected)), got in zip(LAYOUTS.items(), said, strict=True):
            assert got == (None if expected is None else Holders.of(expected)), name


# ---------------------------------------------------------------- what reading may cost


def peak_of_reading(child: SavedChild, name: str) -> int:
    """Bytes that numpy and Python held at once. numpy's arrays are traced, and what is made of a mask is one."""
    tracemalloc.start()
    try:
        with pytest.raises(ChildFileError, match="ascending elements"):
            child.read(name)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_forged_mask_is_counted_before_anything_is_made_of_it(tmp_path: Path) -> None:
    """8 MiB of ones in the file, and an entry that says otherwise."""
    numel = 64 << 20
    bits = torch.full((numel // 8,), 255, dtype=torch.uint8)
    lie = [PieceEntry("w", 0, numel, numel - 1, "bits")]
    path = tmp_path / f"child-00000-{0:016x}.safetensors"
    save_file({"w@0/mask": bits}, path, {"pieces": adapter(list[PieceEntry]).dump_json(lie).decode()})
    file = FileEntry(path.name, path.stat().st_size, blake2b(path))
    parameters = (ParameterEntry("w", (numel,), "float32", True),)
    write_manifest(tmp_path, Manifest("0", "export", {}, parameters, (file,)))
    child = open_child(tmp_path)
    assert peak_of_reading(child, "w") < 3 * bits.numel()


def test_comparing_forged_shapes_costs_what_the_files_have(tmp_path: Path) -> None:
    """2**50 elements, two of them inside: a mask of them would be a petabyte."""
    numel = 2**50
    for name, inside in (("one", [5, 2**49]), ("other", [5, 2**48, 2**49])):
        folder = tmp_path / name
        folder.mkdir()
        index = torch.tensor(inside)
        values = torch.arange(len(inside)).float()
        file = write_pieces(folder, 0, [Piece("w", 0, numel, index, {"values": values})])
        assert file is not None
        parameters = (ParameterEntry("w", (numel,), "float32", True),)
        write_manifest(
            folder, Manifest("0", "export", {}, parameters, (file,)).with_holders(Holders.of([Held(0, numel, 0)]))
        )
    (overlap,) = compare(open_child(tmp_path / "one"), open_child(tmp_path / "other"))
    assert (overlap.first, overlap.second, overlap.both, overlap.equal) == (2, 3, 2, 1)


def test_masks_of_a_checkpoint_are_made_one_at_a_time(tmp_path: Path) -> None:
    """As a compact child uses them: made, looked at, and let go."""
    numel = 1000
    shards = [FlatShard(torch.zeros(numel), (Fragment(f"h.{i}", 0, 0, numel),)) for i in range(10)]
    inside = torch.arange(numel) % 3 == 0
    file = write_pieces(tmp_path, 0, [Piece.of(f"h.{i}", 0, inside) for i in range(10)])
    assert file is not None
    entries = tuple(ParameterEntry(f"h.{i}", (numel,), "float32", True) for i in range(10))
    write_manifest(tmp_path, Manifest("0", "checkpoint", {}, entries, (file,)))
    masks = read_masks(open_child(tmp_path), shards)
    made: list[weakref.ref[torch.Tensor]] = []
    for mask in masks:
        assert torch.equal(mask, inside)
        made.append(weakref.ref(mask))
        assert sum(ref() is not None for ref in made) <= 2
    assert len(made) == 10


def masks_alive_in_a_report(family: str) -> tuple[int, int]:
    """ChildTuning-F: masks that were made, and those of them that were alive at once."""
    with engine_of(Setup(family, stage=2)) as engine:
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-F", "reserve_p": 0.3})
        made: list[weakref.ref[torch.Tensor]] = []
        most = 0
        policy: Any = child._hooks.child
        make = policy.child_mask

        def counted(*args: Any) -> torch.Tensor:
            nonlocal most
            mask: torch.Tensor = make(*args)
            made.append(weakref.ref(mask))
            most = max(most, sum(ref() is not None for ref in made))
            return mask

        policy.child_mask = counted
        kept = child.report().kept
        assert kept > 0
        return len(made), most


def test_a_report_of_a_task_free_child_holds_one_mask(pool: RankPool) -> None:
    for made, most in pool[2].run(masks_alive_in_a_report, "bert"):
        assert made > 10
        assert most <= 2


def test_copies_of_masters_are_on_the_host() -> None:
    """Of a shard that is a view of a larger buffer on an accelerator, as a save has them."""
    with FakeTensorMode():
        buffer = torch.empty(100, dtype=torch.bfloat16, device="lazy")  # as good as any
        assert _with_own_storage(buffer) is buffer
        copy = _with_own_storage(buffer[20:50])
    assert (copy.device.type, copy.dtype, copy.shape) == ("cpu", torch.bfloat16, (30,))


def test_a_child_that_is_on_a_model_keeps_small_indices(tmp_path: Path) -> None:
    """What `revert` needs: the values, and four bytes of place for each."""
    model = torch.nn.Linear(40, 25, bias=False)
    base = model.weight.detach().clone()
    inside = torch.arange(1000) % 50 == 0
    tuned = torch.where(inside, base.view(-1) + 1, base.view(-1))
    file = write_pieces(tmp_path, 0, [Piece.of("weight", 0, inside, values=tuned)])
    assert file is not None
    extra = describe(model, {"weight": fingerprint(base.view(-1), 0, inside)}, 1)
    entries = parameter_entries(model, ["weight"])
    write_manifest(tmp_path, seal(Manifest("0", "export", {}, entries, (file,), extra)))
    applied = apply_child(model, tmp_path)
    assert torch.equal(model.weight.view(-1), tuned)
    assert sum(t.nbytes for _, *kept in applied._replaced for t in kept if t is not None) == 20 * (4 + 4)
    applied.revert()
    assert torch.equal(model.weight, base)

"""Every reader of what the library writes, on hundreds of damaged and forged folders.

Only the library's own error comes out, with a remedy; no crash; and no allocation beyond what the files' size allows: the address
space of the process is limited meanwhile. `--fuzz-examples 100000` is a long run.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_childtune import apply_child
from ds_childtune._version import __version__
from ds_childtune.checkpoint import child as checkpoint
from ds_childtune.checkpoint.rank_file import read_layout, restore_random_states, write_rank_file
from ds_childtune.checkpoint.run_record import DeepSpeedFile, Progress, RunRecord
from ds_childtune.checkpoint.tag_folder import read_latest, write_latest
from ds_childtune.child.compact import CompactChild
from ds_childtune.child_files.compare import compare
from ds_childtune.child_files.export_info import KIND, ExportInfo, describe, parameter_entries
from ds_childtune.child_files.fingerprint import fingerprint
from ds_childtune.child_files.format import ChildFileError, Manifest, Piece, parse, seal
from ds_childtune.child_files.holders import Held, Holders, Run, ranks_with
from ds_childtune.child_files.reader import open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.config import ChildTuningConfig
from ds_childtune.random_states import read_random_states, write_random_states
from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.engine import Wrapper
from ds_childtune.zero.layout import Layout, SavedShard
from tests.support.fuzzing import Files, mutated, read_files, write_files

HEADROOM = 256 << 20
"""Bytes that reading may take. The folders have a few KB."""

START = 0
"""The first seed."""


class Tiny(nn.Module):
    """Parameters that make every kind of piece."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.few = nn.Parameter(torch.randn(30, 30))
            self.some = nn.Parameter(torch.randn(41))
            self.whole = nn.Parameter(torch.randn(3, 5).bfloat16())
            self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))


def write_export(folder: Path) -> None:
    """What two ranks would write."""
    model = Tiny()
    inside = {"few": torch.arange(900) % 100 == 3, "some": torch.arange(41) % 2 == 0, "whole": torch.ones(15).bool()}
    values = {name: model.get_parameter(name).detach().view(-1) for name in (*inside, "frozen")}
    ranks: list[list[Piece]] = [[], []]
    for name, mask in inside.items():
        cut = mask.numel() // 3
        ranks[0].append(Piece.of(name, 0, mask[:cut], values=values[name][:cut] + 1))
        ranks[1].append(Piece.of(name, cut, mask[cut:], values=values[name][cut:] + 1))
    ranks[0].append(Piece("count", 0, 1, None, {"values": torch.tensor([5])}))
    files = [write_pieces(folder, rank, pieces) for rank, pieces in enumerate(ranks)]
    sums = {name: fingerprint(values[name], 0, inside.get(name)) for name in values}
    entries = parameter_entries(model, [*inside, "count"])
    extra = describe(model, sums, 7)
    cuts = {name: mask.numel() // 3 for name, mask in inside.items()}
    held = [
        Held(0, cuts[e.name], e.numel - cuts[e.name]) if e.name in cuts else Held(0, int(e.stored), 0) for e in entries
    ]
    manifest = Manifest(__version__, KIND, {}, entries, tuple(f for f in files if f), extra)
    write_manifest(folder, seal(manifest.with_holders(Holders.of(held))))


def read_export(folder: Path) -> None:
    """All that is ever done to an export."""
    child = open_child(folder, kind=KIND)
    ExportInfo.of(child.manifest, folder)
    for name in sorted(child.stored):
        for piece in child.pieces(name):
            piece.mask()
        child.read(name)
    compare(child, child)
    apply_child(Tiny(), folder)


class OneShard:
    """One flat shard with the parameters of `Tiny` that train, and a compact child in it."""

    SIZES = {"few": 900, "some": 41, "whole": 15}
    CONFIG = ChildTuningConfig(mode="ChildTuning-D", reserve_p=0.5, optimizer_state="compact")

    def __init__(self) -> None:
        fragments, start = [], 0
        for name, numel in self.SIZES.items():
            fragments.append(Fragment(name, 0, start, numel, eligible=name != "whole"))
            start += numel
        self.shard = FlatShard(nn.Parameter(torch.arange(float(start))), tuple(fragments))
        self.optimizer = torch.optim.AdamW([self.shard.tensor])

    def child(self, mask: Tensor) -> CompactChild:
        return CompactChild.of([self.shard], [mask], self.optimizer)


def write_checkpoint(folder: Path) -> None:
    """What one rank would write."""
    run = OneShard()
    run.shard.tensor.grad = torch.ones(run.shard.numel)
    run.optimizer.step()
    mask = torch.arange(run.shard.numel) % 3 != 0
    run.shard.fragments[-1].of(mask).fill_(True)  # dense: inside the child in full
    child = run.child(mask)
    own = folder / "child"
    own.mkdir()
    write_latest(folder, "child")
    (folder / "model.pt").write_bytes(b"DeepSpeed's own, which only DeepSpeed reads")
    fragments = [(run.shard, fragment) for fragment in run.shard.fragments]
    file = write_pieces(own, 0, checkpoint.pieces(child, fragments, checkpoint.moment_keys(child)))
    assert file is not None
    rank_file = write_rank_file(own, 0, read_random_states(), [SavedShard.of(run.shard, 0, 0, 0)])
    record = RunRecord(
        Progress(3, 1),
        True,
        1,
        "AdamW",
        "float32",
        (rank_file,),
        (DeepSpeedFile.of(folder / "model.pt", 0, "model"),),
    )
    shapes = {name: torch.Size([numel]) for name, numel in run.SIZES.items()}
    entries = checkpoint.parameter_entries(shapes, shapes, torch.float32)
    config = run.CONFIG.model_dump(mode="json")
    holders = Holders.of([Held(0, numel, 0) for numel in run.SIZES.values()])
    manifest = Manifest(__version__, checkpoint.KIND, config, entries, (file,), asdict(record))
    write_manifest(own, seal(manifest.with_holders(holders)))


def test_a_checkpoint_of_an_unknown_wrapper_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)  # its optimizer is no class of DeepSpeed's
    record = RunRecord.of(open_child(tmp_path / "child"))
    with pytest.raises(ChildFileError, match=r"expected optimizer state in one of plain, .* got 'AdamW'.*Remedy"):
        record.wrapper(tmp_path)
    assert replace(record, optimizer="plain").wrapper(tmp_path) is Wrapper.NONE


def read_checkpoint(folder: Path) -> None:
    """All that is done to the library's own files when a checkpoint is loaded."""
    run = OneShard()
    read_latest(folder)
    opened = open_child(folder / "child", kind=checkpoint.KIND)
    record = RunRecord.of(opened)
    record.check_files(folder, 0, 1)
    checkpoint.check_config(opened, run.CONFIG)
    shapes = {name: torch.Size([numel]) for name, numel in run.SIZES.items()}
    checkpoint.check_model(opened, shapes, shapes)
    if opened.manifest.holders is not None:
        runs = [Run(f.name, f.param_start, f.param_start + f.numel) for f in run.shard.fragments]
        ranks_with(opened.manifest.holders, {p.name: p.numel for p in opened.manifest.parameters}, runs)
    layout = Layout(shard for file in record.ranks for shard in read_layout(opened.folder / file.name))
    for fragment in run.shard.fragments:
        for piece in layout.find(fragment):
            # The loader takes this of what DeepSpeed has stored.
            assert 0 <= piece.source_start <= piece.source_start + piece.numel <= piece.source.numel
    (mask,) = checkpoint.read_masks(opened, [run.shard])
    checkpoint.read_compact(opened, run.child(mask))
    before = read_random_states()
    try:
        restore_random_states(opened.folder / record.ranks[0].name)
    finally:
        write_random_states(before)


OLD = Path(__file__).parent / "data" / "version_1"
"""Written by the last library that wrote version 1, with `write_export` and `write_checkpoint`."""


def written_before(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.copytree(OLD / kind, folder, dirs_exist_ok=True)

    return write


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "export": (write_export, read_export),
    "checkpoint": (write_checkpoint, read_checkpoint),
    "export of version 1": (written_before("export"), read_export),
    "checkpoint of version 1": (written_before("checkpoint"), read_checkpoint),
}
"""How a folder is written, and read."""


@contextmanager
def little_memory() -> Iterator[None]:
    """An allocation of more than `HEADROOM` fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(read: Callable[[Path], None], folder: Path, files: Files) -> bool:
    """Whether the reader raises an error of ours. Any other propagates."""
    write_files(folder, files)
    try:
        read(folder)
    except ValueError as error:
        if type(error) not in (ChildFileError, ValueError) or "Remedy" not in str(error) or len(str(error)) > 2000:
            raise
        return True
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a place: thousands of files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", READERS)
def test_only_our_errors_come_out(
    kind: str, folder: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    write, read = READERS[kind]
    write(folder)
    whole = read_files(folder)
    assert not refused(read, folder, whole), "vacuous: the folder as it was written is refused"
    examples = request.config.getoption("--fuzz-examples") // (2 if kind.endswith("1") else 1)
    count = 0
    with little_memory():
        with pytest.raises((RuntimeError, MemoryError)):
            torch.empty(2 * HEADROOM, dtype=torch.uint8)
        for seed in range(START, START + examples):
            files, done = mutated(whole, seed)
            try:
                count += refused(read, folder, files)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {done}: {type(error).__name__}: {error}") from error
    record_property("refused", count / examples)
    # Forged values, config or names of nothing are as good as others: no reader can tell.
    assert 0.7 * examples < count < examples
    print(f"{kind}: {examples} mutated folders, {count} refused")


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a written export, with another manifest, whose checksum is right."""
    write_export(folder)
    path = folder / "child.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(seal(parse(Manifest, json.dumps(manifest), "")).json())
    return folder


def hold(name: str, first: int, head: int, each: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        at = [p["name"] for p in manifest["parameters"]].index(name)
        for column, number in (("first", first), ("head", head), ("each", each)):
            manifest["holders"][column][at] = number

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (hold("few", 0, 300, 0), "few: holders of its elements"),
        (hold("few", 0, 0, 0), "few: holders of its elements"),
        (hold("few", 0, 901, 600), "few: holders of its elements"),
        (hold("few", 0, 299, 601), "few: expected the elements 0 to 299 in one piece"),
        (hold("few", 1, 900, 0), "few: expected the elements 0 to 0 in one piece"),
        (hold("few", 0, 300, 1), "expected the elements 300 to 301 in one piece"),
        (hold("few", 7, 900, 0), "few: expected the elements 0 to 0 in one piece"),
        (lambda manifest: manifest["holders"]["first"].pop(), "holders of every parameter"),
    ],
)
def test_holders_that_are_not_so_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    folder = forged(tmp_path, change)
    with pytest.raises(ChildFileError, match=text):
        open_child(folder)
    with pytest.raises(ChildFileError):  # without a look at every file, reading the parameter finds it
        open_child(folder, checksums=False).read("few")

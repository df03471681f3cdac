"""What a checkpoint and an export cost each rank's host when there are many ranks: CPU seconds, memory, and files that are opened.

    python tests/benchmarks/scale.py

One process stands for one rank: names and counts of parameters, fragments and files are real ones (ZeRO-3), tensors are tiny. Files of
ranks that nobody asks for are not written. Each line is measured in a separate process; peak is above what imports take.
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from ds_childtune._version import __version__
from ds_childtune.checkpoint import child as child_checkpoint
from ds_childtune.checkpoint import rank_file
from ds_childtune.checkpoint.child import check_model, parameter_entries, pieces, read_compact, read_masks
from ds_childtune.checkpoint.run_record import DeepSpeedFile, Progress, RunRecord
from ds_childtune.child.compact import CompactChild
from ds_childtune.child_files.format import FileEntry, Manifest, Piece, seal
from ds_childtune.child_files.holders import Held, Holders, Run, ranks_with
from ds_childtune.child_files.reader import SavedChild, open_child, read_manifest
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.random_states import read_random_states
from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.layout import Layout, SavedShard

SHARE, KEPT = 8, 2
"""Elements of each parameter on each rank that writes, and how many of them are inside the child."""
MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def llama(layers: int = 80) -> list[str]:
    """Llama-3-70B's parameters."""
    parts = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    blocks = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *blocks, "model.norm.weight", "lm_head.weight"]


def mixture(layers: int = 94, experts: int = 128) -> list[str]:
    """Qwen3-235B-A22B's, with every expert's matrices by themselves."""
    parts = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")] + ["mlp.gate"]
    parts += [f"mlp.experts.{e}.{n}_proj" for e in range(experts) for n in ("gate", "up", "down")]
    return [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]


MODELS: dict[str, Callable[[], list[str]]] = {"Llama-3-70B": llama, "mixture": mixture}


@dataclass(frozen=True)
class Rank:
    """What one rank of ZeRO-3 holds: `share` elements of every parameter, in one flat shard."""

    names: Sequence[str]
    rank: int
    share: int

    def shard(self) -> FlatShard:
        fragments = (Fragment(n, self.rank * self.share, i * self.share, self.share) for i, n in enumerate(self.names))
        return FlatShard(nn.Parameter(torch.zeros(len(self.names) * self.share)), tuple(fragments))

    def child(self) -> CompactChild:
        shard = self.shard()
        optimizer = torch.optim.AdamW([shard.tensor])
        mask = (torch.arange(self.share) < KEPT * self.share // SHARE).repeat(len(self.names))
        child = CompactChild.of([shard], [mask], optimizer)
        tensor = child.shards[shard.tensor].tensor
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        optimizer.state[tensor] = {"step": torch.tensor(1.0), **moments}
        return child


def absent(name: str) -> FileEntry:
    """A file that nobody will open."""
    return FileEntry(name, 0, "0" * 32)


def write_checkpoint(folder: Path, names: Sequence[str], world_size: int, ranks: Sequence[int]) -> Manifest:
    """The subfolder of a tag, with the files of some ranks."""
    own = folder / "child"
    own.mkdir(parents=True)
    files, rank_files, deepspeed = [], [], []
    states = read_random_states()
    for rank in range(world_size):
        path = folder / f"rank_{rank}_optim_states.pt"
        if rank in ranks:
            child = Rank(names, rank, SHARE).child()
            (shard,) = (s.flat for s in child.shards.values())
            file = write_pieces(own, rank, pieces(child, [(shard, f) for f in shard.fragments], MOMENTS))
            assert file is not None
            files.append(file)
            layout = [SavedShard.of(shard, rank, 0, 0)]
            rank_files.append(rank_file.write_rank_file(own, rank, states, layout))
            path.write_bytes(b"DeepSpeed's")
            deepspeed.append(DeepSpeedFile.of(path, rank, "optim"))
        else:
            files.append(absent(f"child-{rank:05d}-{0:016x}.safetensors"))
            rank_files.append(absent(f"rank-{rank:05d}.safetensors"))
            deepspeed.append(DeepSpeedFile(rank, "optim", path.name, 0, "0" * 8))
    manifest = manifest_of(names, world_size, files, rank_files, deepspeed)
    (own / "child.json").write_bytes(manifest.json())
    return manifest


def manifest_of(
    names: Sequence[str],
    world_size: int,
    files: Sequence[FileEntry],
    rank_files: Sequence[FileEntry],
    deepspeed: Sequence[DeepSpeedFile],
) -> Manifest:
    record = RunRecord(Progress(3), True, world_size, "Stage3", "float32", tuple(rank_files), tuple(deepspeed))
    shapes = {name: torch.Size([SHARE * world_size]) for name in names}
    entries = parameter_entries(shapes, names, torch.float32)
    manifest = Manifest(__version__, child_checkpoint.KIND, {}, entries, tuple(files), asdict(record))
    return seal(manifest.with_holders(Holders.of([Held(0, SHARE, SHARE)] * len(names))))


def write_export(folder: Path, names: Sequence[str], world_size: int) -> None:
    folder.mkdir(parents=True)
    mask = torch.arange(SHARE) < KEPT
    files = []
    for rank in range(world_size):
        own = [Piece.of(name, rank * SHARE, mask, values=torch.ones(SHARE)) for name in names]
        files.append(write_pieces(folder, rank, own))
    entries = parameter_entries({n: torch.Size([SHARE * world_size]) for n in names}, names, torch.float32)
    manifest = Manifest(__version__, "export", {}, entries, tuple(f for f in files if f), {})
    write_manifest(folder, seal(manifest.with_holders(Holders.of([Held(0, SHARE, SHARE)] * len(names)))))


# ---------------------------------------------------------------- what is measured


def save_manifest(folder: Path, names: Sequence[str], world_size: int) -> str:
    """Rank 0: only the manifest."""
    ranks = range(world_size)
    pieces_of = [absent(f"child-{rank:05d}-{0:016x}.safetensors") for rank in ranks]
    files = [absent(f"rank-{rank:05d}.safetensors") for rank in ranks]
    deepspeed = [DeepSpeedFile(rank, "optim", f"rank_{rank}_optim_states.pt", 0, "0" * 8) for rank in ranks]
    data = manifest_of(names, world_size, pieces_of, files, deepspeed).json()
    return f"{len(data) / 2**20:.1f} MiB of json"


def opened_child(
    folder: Path, rank: int, ranks: int, names: Sequence[str], world_size: int
) -> tuple[SavedChild, RunRecord]:
    """As `CheckpointLoader` does it on one rank of `ranks`, for a checkpoint of `world_size`."""
    own = folder / "child"
    child = open_child(own, kind=child_checkpoint.KIND, checksums=False, manifest=read_manifest(own))
    record = RunRecord.of(child)
    child.check_contents(rank, ranks)
    record.check_files(folder, rank, ranks)
    check_model(child, {name: torch.Size([SHARE * world_size]) for name in names}, names)
    return child, record


def load_same_shape(folder: Path, names: Sequence[str], world_size: int) -> str:
    rank = world_size - 1
    child, record = opened_child(folder, rank, world_size, names, world_size)
    rank_file.read_layout(child.folder / record.ranks[rank].name)
    _load(child, Rank(names, rank, SHARE))
    return ""


def load_elastic(folder: Path, names: Sequence[str], world_size: int) -> str:
    """On half as many ranks. The last one takes its share of the checksums of files that were written for this."""
    mine = Rank(names, world_size // 2 - 1, 2 * SHARE)
    child = open_child(folder / "child", checksums=False)
    child.check_contents(world_size - 1, world_size)
    record = RunRecord.of(child)
    runs = [Run(f.name, f.param_start, f.param_start + f.numel) for f in mine.shard().fragments]
    ranks = ranks_with(child.manifest.holders, {p.name: p.numel for p in child.manifest.parameters}, runs)
    layout = Layout(s for r in ranks for s in rank_file.read_layout(child.folder / record.ranks[r].name))
    for fragment in mine.shard().fragments:
        assert sum(piece.numel for piece in layout.find(fragment)) == fragment.numel
    _load(child, mine)
    return f"of {len(ranks)} ranks"


def _load(child: SavedChild, mine: Rank) -> None:
    shard = mine.shard()
    compact = CompactChild.of([shard], read_masks(child, [shard]), torch.optim.AdamW([shard.tensor]))
    read_compact(child, compact)
    (loaded,) = compact.shards.values()
    assert loaded.tensor.numel() == len(mine.names) * mine.share * KEPT // SHARE


def read_all(folder: Path, names: Sequence[str], world_size: int) -> str:
    """What merge, compose and apply read of a whole model, checksums included."""
    child = open_child(folder, kind="export")
    read = child.read_runs([child.whole(name) for name in names])
    assert all(piece.kept == KEPT * world_size for piece in read)
    return ""


@dataclass
class Opens:
    count: int = 0


@contextmanager
def counting_opens(folder: Path) -> Iterator[Opens]:
    """How often a file below `folder` is opened for the length of a `with`."""
    opens = Opens()
    whole_open, whole_safe_open = io.open, rank_file.safe_open

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            opens.count += str(path).startswith(str(folder))
            return function(path, *args, **kwargs)

        return call

    with (
        mock.patch.object(io, "open", counted(whole_open)),
        mock.patch.object(builtins, "open", counted(whole_open)),
        mock.patch.object(rank_file, "safe_open", counted(whole_safe_open)),
    ):
        yield opens


CASES: dict[str, tuple[Callable[[Path, Sequence[str], int], str], str]] = {
    "save: manifest": (save_manifest, ""),
    "load, same shape": (load_same_shape, "checkpoint"),
    "load, half the ranks": (load_elastic, "checkpoint"),
    "read all (merge, apply)": (read_all, "export"),
}
"""What is measured, and the files that it needs."""


def status(key: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key))) / 1024


def measured(case: str, model: str, world_size: int, folder: Path) -> dict[str, Any]:
    """In this process."""
    function, _ = CASES[case]
    names = MODELS[model]()
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # imports much
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    started = time.process_time()
    with counting_opens(folder) as opens:
        note = function(folder, names, world_size)
    seconds = time.process_time() - started
    peak = status("VmHWM") - before
    return {"seconds": seconds, "MiB": peak, "opens": opens.count, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64, 1024])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case, model, ranks, folder = json.loads(arguments.one)
        print(json.dumps(measured(case, model, ranks, Path(folder))))
        return
    print(f"{'model':12} {'case':24} {'ranks':>5} {'CPU s':>8} {'peak MiB':>9} {'opens':>6}")
    for model in arguments.models:
        for world_size in arguments.ranks:
            for case in arguments.cases:
                line(case, model, world_size)


def line(case: str, model: str, world_size: int) -> None:
    names, kind = MODELS[model](), CASES[case][1]
    if kind == "export" and len(names) * world_size > 1_000_000:
        print(f"{model:12} {case:24} {world_size:5} {'(too many pieces to write here)':>25}")
        return
    root = Path(tempfile.mkdtemp())
    try:
        folder = root / "tag"
        if kind == "checkpoint":
            write_checkpoint(folder, names, world_size, [world_size - 2, world_size - 1])
        if kind == "export":
            write_export(folder, names, world_size)
        command = [sys.executable, __file__, "--one", json.dumps([case, model, world_size, str(folder)])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        got: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        numbers = f"{got['seconds']:8.2f} {got['MiB']:9.0f} {got['opens']:6}"
        print(f"{model:12} {case:24} {world_size:5} {numbers} {got['note']}", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

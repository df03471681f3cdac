"""Every reader of what the library writes, on thousands of damaged and forged folders.

Only the library's own error comes out, with a remedy; no crash; and no allocation beyond what the files' size allows: the address
space of the process is limited meanwhile. `--fuzz-examples 100000` for a long run.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_childtune import apply_child
from ds_childtune._version import __version__
from ds_childtune.child_compare import compare
from ds_childtune.child_export import KIND, ExportInfo, describe, parameter_entries
from ds_childtune.child_format import ChildFileError, Manifest, Piece
from ds_childtune.child_reader import open_child
from ds_childtune.child_writer import commit, write_pieces
from ds_childtune.fingerprint import fingerprint
from tests.fuzzing import Files, mutated, read_files, write_files

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
    commit(folder, Manifest(__version__, KIND, {}, entries, tuple(f for f in files if f), describe(model, sums, 7)))


def read_export(folder: Path) -> None:
    """All that is ever done to an export."""
    child = open_child(folder, kind=KIND)
    ExportInfo.of(child.manifest, folder)
    for name in child.places:
        for piece in child.pieces(name):
            piece.mask()
        child.read(name)
    compare(child, child)
    apply_child(Tiny(), folder)


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {"export": (write_export, read_export)}
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


@pytest.mark.parametrize("kind", READERS)
def test_only_our_errors_come_out(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    write, read = READERS[kind]
    write(tmp_path)
    whole = read_files(tmp_path)
    assert not refused(read, tmp_path, whole), "vacuous: the folder as it was written is refused"
    examples = request.config.getoption("--fuzz-examples")
    count = 0
    with little_memory():
        with pytest.raises((RuntimeError, MemoryError)):
            torch.empty(2 * HEADROOM, dtype=torch.uint8)
        for seed in range(START, START + examples):
            files, done = mutated(whole, seed)
            try:
                count += refused(read, tmp_path, files)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {done}: {type(error).__name__}: {error}") from error
    record_property("refused", count / examples)
    # Forged values, config or names of nothing are as good as others: no reader can tell.
    assert 0.7 * examples < count < examples
    print(f"{kind}: {examples} mutated folders, {count} refused")

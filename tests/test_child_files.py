"""A child's files: what is written comes back, in any partition, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ds_childtune.child_files import fingerprint as fingerprints
from ds_childtune.child_files.atomic import new_folder
from ds_childtune.child_files.fingerprint import fingerprint, signed
from ds_childtune.child_files.format import DTYPES, ChildFileError, Manifest, ParameterEntry, Piece
from ds_childtune.child_files.reader import open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces

MASKS = st.lists(st.booleans(), min_size=1, max_size=70) | st.tuples(st.booleans(), st.integers(1, 70)).map(
    lambda t: [t[0]] * t[1]
)


def values_like(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Every element another value, as far as the dtype can tell."""
    return torch.arange(mask.numel()).to(dtype)


def write(folder: Path, masks: dict[str, Tensor], cuts: Sequence[int], dtype: torch.dtype) -> None:
    """A child of whole masks, each parameter cut at the same elements, its pieces dealt to three writers."""
    writers: list[list[Piece]] = [[], [], []]
    for name, mask in masks.items():
        values = values_like(mask, dtype)
        ends = sorted({min(c, mask.numel()) for c in cuts} | {0, mask.numel()})
        for i, (start, end) in enumerate(pairwise(ends)):
            part = slice(start, end)
            piece = Piece.of(name, start, mask[part], values=values[part], moment=2 * values[part].float())
            # One number that all pieces have, and one that only the last of them has.
            numbers = {"step": 3} | ({"last": 0.5} if end == mask.numel() else {})
            writers[i % 3].append(replace(piece, numbers=numbers))
    files = [write_pieces(folder, rank, pieces) for rank, pieces in enumerate(writers)]
    name_of = {dtype: name for name, dtype in DTYPES.items()}
    parameters = tuple(ParameterEntry(n, (m.numel(),), name_of[dtype], True) for n, m in masks.items())
    write_manifest(folder, Manifest("0", "export", {}, parameters, tuple(f for f in files if f), {"note": [1, None]}))


@settings(max_examples=60)
@given(
    st.lists(MASKS, min_size=1, max_size=3),
    st.sets(st.integers(1, 70)),
    st.sampled_from(list(DTYPES.values())),
    st.data(),
)
def test_what_is_written_comes_back_in_any_partition(
    masks: list[list[bool]], cuts: set[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    whole = {f"h.{i}.weight": torch.tensor(mask) for i, mask in enumerate(masks)}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), whole, sorted(cuts), dtype)
        child = open_child(folder, kind="export")
        assert child.manifest.extra == {"note": [1, None]}
        for name, mask in whole.items():
            start = data.draw(st.integers(0, mask.numel()))
            numel = data.draw(st.integers(0, mask.numel() - start))
            part = slice(start, start + numel)
            piece = child.read(name, start, numel)
            assert torch.equal(piece.mask(), mask[part])
            values = values_like(mask, dtype)[part][mask[part]]
            assert piece.tensors["values"].dtype == dtype
            assert torch.equal(piece.tensors["values"], values)
            assert torch.equal(piece.tensors["moment"], 2 * values.float())
            last = max((c for c in cuts if c < mask.numel()), default=0)
            reaches = (last < start + numel and start < mask.numel() and numel > 0) or last == 0
            assert piece.numbers == {"step": 3} | ({"last": 0.5} if reaches else {})
            assert child.kept(name) == int(mask.sum())
            assert torch.equal(torch.cat([p.mask() for p in child.pieces(name)]), mask)


def test_others_can_read_the_files(tmp_path: Path) -> None:
    """With safetensors and the format note only: both encodings of a mask, and none for a whole piece."""
    few, many, all_of_them = torch.zeros(100).bool(), torch.ones(100).bool(), torch.ones(100).bool()
    few[[3, 97]] = True
    many[50] = False
    write(tmp_path, {"few": few, "many": many, "all": all_of_them}, [], torch.float32)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    assert tensors["few@0/index"].tolist() == [3, 97]
    bits = [bool(int(byte) >> i & 1) for byte in tensors["many@0/mask"] for i in range(8)]
    assert bits[:100] == many.tolist()
    assert not any(bits[100:])
    assert sorted(k for k in tensors if k.startswith("all")) == ["all@0/moment", "all@0/values"]
    assert json.loads((tmp_path / "child.json").read_text())["version"] == 1


def test_writing_again_replaces_the_child_in_one_instant(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.arange(9) % 2 == 0}, [4], torch.float32)
    before = sorted(p.name for p in tmp_path.iterdir())
    # Killed between its pieces and the manifest, and another in the middle of its pieces: the first child is still there.
    write_pieces(tmp_path, 0, [Piece.of("w", 0, torch.ones(9).bool())])
    (tmp_path / ".child-00007.safetensors.tmp").mkdir()
    (tmp_path / ".child-00007.safetensors.tmp" / "half").write_bytes(b"half a file")
    (tmp_path / "a file of mine.txt").write_text("stays")
    assert open_child(tmp_path).kept("w") == 5
    write(tmp_path, {"w": torch.arange(9) % 3 == 0}, [4], torch.float32)
    assert open_child(tmp_path).kept("w") == 3
    after = sorted(p.name for p in tmp_path.iterdir())
    assert len(after) == len(before) + 1 == 4
    assert "a file of mine.txt" in after
    assert not {name for name in before if name != "child.json"} & set(after)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "others may read all files or none"


def killed_while_writing(folder: Path, count: int) -> bool:
    """Write other masks in a process that kills itself before its `count`-th change of a file. False when it comes to its end."""

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        # Newer Pythons warn of threads: those of torch, for which nothing is left to do here.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        sys.addaudithook(audit)
        write(folder, {"w": torch.arange(9) % 3 == 0}, [4], torch.float32)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_writer_that_is_killed_anywhere_leaves_a_whole_child(tmp_path: Path) -> None:
    """The one that was there before, or its own; and the next writer leaves no litter."""
    seen = []
    count = 1
    while True:
        write(tmp_path, {"w": torch.arange(9) % 2 == 0}, [4], torch.float32)
        assert sum(1 for _ in tmp_path.iterdir()) == 3
        if not killed_while_writing(tmp_path, count):
            break
        seen.append(open_child(tmp_path).kept("w"))
        count += 1
    assert len(seen) > 15
    assert set(seen) == {5, 3}, "vacuous: killed only on one side of the commit"
    assert seen == sorted(seen, reverse=True)


def test_a_file_of_another_machine_is_missed_before_the_manifest(tmp_path: Path) -> None:
    file = write_pieces(tmp_path, 0, [Piece.of("w", 0, torch.ones(9).bool())])
    assert file is not None
    (tmp_path / file.name).unlink()
    with pytest.raises(RuntimeError, match="shared file system"):
        write_manifest(tmp_path, Manifest("0", "export", {}, (), (file,)))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_readable_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is the nearest that a process can do to itself."""
    write(tmp_path, {"w": torch.arange(9) % 2 == 0}, [], torch.float32)
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RuntimeError, match=r"expected to write .*, got: File too large\. Remedy"):
            write_pieces(tmp_path, 1, [Piece.of("w", 0, torch.ones(9000).bool(), values=torch.ones(9000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert open_child(tmp_path).kept("w") == 5


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the place of a folder: root, too, is refused there."""
    (tmp_path / "file").write_text("")
    for act in (lambda p: new_folder(p), lambda p: write_pieces(p, 0, [Piece.of("w", 0, torch.ones(9).bool())])):
        with pytest.raises(RuntimeError, match=r"expected to write .*, got: Not a directory\. Remedy: choose a path"):
            act(tmp_path / "file" / "child")


def test_a_folder_that_is_no_child(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ChildFileError, match=r"expected a child's folder with a readable child\.json"):
            open_child(folder)


# ---------------------------------------------------------------- the fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_shards_add_up_to_one_fingerprint(dtype: torch.dtype) -> None:
    """Over tiles and cuts anywhere; 100,000 elements are four tiles."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator).to(dtype)
    inside = torch.rand(100_000, generator=generator) < 0.5
    whole = fingerprint(values, 0, inside)
    cuts = [0, 1, 32_768, 32_769, 77_777, 100_000]
    shares = [fingerprint(values[a:b], a, inside[a:b]) for a, b in pairwise(cuts)]
    assert signed(sum(shares)) == whole
    everything = fingerprint(values, 0, None)
    assert signed(everything - fingerprint(values, 0, ~inside)) == whole != everything


def test_the_fingerprint_of_the_format() -> None:
    """Numbers that files in the world have."""
    values = torch.arange(70_000).float()
    assert fingerprint(values, 0, None) == -697400044675402240
    assert fingerprint(values[10:], 10, values[10:] % 3 == 0) == 103221346447316480


@pytest.mark.parametrize("tile", [1, 2, 3])
def test_a_fingerprint_is_the_same_however_much_is_worked_on_at_once(tile: int) -> None:
    values = torch.randn(8 * 32_768 + 5, generator=torch.Generator().manual_seed(0))
    for start in (0, 1, 32_768):
        expected = fingerprint(values, start, None)
        with mock.patch.object(fingerprints, "tile_of", return_value=tile * 32_768):
            assert fingerprint(values, start, None) == expected


def test_a_fingerprint_sees_every_bit_and_every_place() -> None:
    values = torch.zeros(40_000)
    seen = {fingerprint(values, 0, None)}
    for place in (0, 1, 32_767, 32_768, 39_999):
        for bit in (0, 22, 31):
            other = values.clone()
            other.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(fingerprint(other, 0, None))
    assert len(seen) == 16
    inside = torch.ones(40_000, dtype=torch.bool)
    assert fingerprint(torch.full((40_000,), torch.nan), 0, inside) == 0

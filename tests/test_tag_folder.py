"""A tag's folder where the file system does not remove what it is told to, as a network's while another process has a file open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ds_childtune.checkpoint import tag_folder


def save(folder: Path, tag: str, text: str) -> None:
    """As `CheckpointSaver` does."""
    tag_folder.prepare(folder, tag)
    partial = folder / tag_folder.partial_tag(tag)
    partial.mkdir()
    (partial / "file").write_text(text)
    tag_folder.publish(folder, tag)
    tag_folder.write_latest(folder, tag)
    tag_folder.tidy(folder, tag)


def kept(path: Path, *, ignore_errors: bool = False, **_: Any) -> None:
    if not ignore_errors:
        raise OSError(39, "Directory not empty", str(path))


def test_a_folder_that_cannot_be_removed_is_in_nobody_s_way(tmp_path: Path) -> None:
    with mock.patch.object(tag_folder, "shutil", SimpleNamespace(rmtree=kept)):
        for i, tag in enumerate(("last", "last", "other", "last")):
            save(tmp_path, tag, str(i))
            assert (tmp_path / tag / "file").read_text() == str(i)
            assert tag_folder.read_latest(tmp_path) == tag
        (tmp_path / tag_folder.partial_tag("killed")).mkdir()
        save(tmp_path, "killed", "again")
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names - {"last", "other", "killed", "latest"}) == 3, "two older ones, and what the killed one left"
    save(tmp_path, "next", "5")
    assert {path.name for path in tmp_path.iterdir()} == {"last", "other", "killed", "next", "latest"}

"""Children and a saved base model: a whole model to load with transformers, or one child out of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_childtune._version import __version__
from ds_childtune.child_files.apply import Conflicts, apply_child
from ds_childtune.child_files.atomic import explained, new_folder, sync_folder
from ds_childtune.child_files.export_info import KIND, ExportInfo, describe, parameter_entries, persistent_buffers
from ds_childtune.child_files.fingerprint import fingerprint
from ds_childtune.child_files.format import DTYPES, Manifest, Piece, seal
from ds_childtune.child_files.holders import Held, Holders
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".gguf", ".ot")


def merge(
    base: str | Path, children: Sequence[str | Path], output: str | Path, conflicts: Conflicts = "refuse"
) -> None:
    """Write the base model with the children on it, as transformers loads it.

    Args:
        base: a saved model, folder or hub name. Of a folder, tokenizer files are copied, too.
        children: folders that `ChildTuner.export` or `compose` wrote, applied in this order.
        output: a folder that does not exist yet; it appears when it is whole.
        conflicts: of an element that two children set to different values: "refuse", or "last", which takes the later child's.

    Raises:
        ValueError, NotImplementedError, RuntimeError: see `apply_child`; or when `output` exists or cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(
            f"{output}: expected a new folder, got one that exists. Remedy: remove it, or write elsewhere."
        )
    model = _tuned(base, _opened(children), conflicts)
    draft = output.with_name(f".{output.name}.tmp")
    with explained(draft):
        shutil.rmtree(draft, ignore_errors=True)
    new_folder(draft)
    with explained(draft):
        model.save_pretrained(draft)
        for path in Path(base).iterdir() if Path(base).is_dir() else ():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not (draft / path.name).exists():
                shutil.copy(path, draft / path.name)
        draft.rename(output)
        sync_folder(output.parent)


def compose(
    base: str | Path, children: Sequence[str | Path], output: str | Path, conflicts: Conflicts = "refuse"
) -> Manifest:
    """Write one child that does what all of them do, in their order.

    Args:
        base: the saved base model, folder or hub name: the new child's fingerprint needs it.
        children, conflicts: see `merge`.
        output: a folder.

    Returns:
        The manifest of the new child, as it is in `output`.

    Raises:
        ValueError, NotImplementedError, RuntimeError: see `apply_child`; or when `output` cannot be written.
    """
    output = Path(output)
    opened = _opened(children)
    model: Any = _tuned(base, opened, conflicts)
    stored = {name for child in opened for name in child.stored}
    inside_of = [_inside(child) for child in opened]
    pieces, sums = [], {}
    for name, tensor in {**dict(model.named_parameters()), **persistent_buffers(model)}.items():
        values = tensor.detach().view(-1)
        inside = torch.zeros(values.numel(), dtype=torch.bool)
        for pieces_of in inside_of:
            if name in pieces_of:
                inside |= pieces_of.pop(name).mask()
        if name in stored:
            pieces.append(Piece.of(name, 0, inside, values=values))
        if isinstance(tensor, nn.Parameter):
            sums[name] = fingerprint(values, 0, inside)
    new_folder(output)
    file = write_pieces(output, 0, pieces)
    config = {"composed": [child.manifest.config for child in opened]}
    steps = sum(ExportInfo.of(child.manifest, child.folder).step for child in opened)
    files = () if file is None else (file,)
    entries = parameter_entries(model, stored)
    manifest = Manifest(__version__, KIND, config, entries, files, describe(model, sums, steps))
    manifest = seal(manifest.with_holders(Holders.of([Held(0, e.numel if e.stored else 0, 0) for e in entries])))
    write_manifest(output, manifest)
    return manifest


def _opened(children: Sequence[str | Path]) -> list[SavedChild]:
    if isinstance(children, (str, Path)):  # a text would be taken for a list of its letters
        raise ValueError(f"expected a list of children's folders, got {children!r}. Remedy: pass [{str(children)!r}].")
    if not children:
        raise ValueError("expected at least one child's folder, got none. Remedy: pass its path.")
    return [open_child(path, kind=KIND, checksums=False) for path in children]


def _inside(child: SavedChild) -> dict[str, Piece]:
    """Which elements of every stored parameter are inside the child, without their values."""
    names = [p.name for p in child.manifest.parameters if p.stored]
    return dict(zip(names, child.read_runs([child.whole(name) for name in names], values=False), strict=True))


def _tuned(base: str | Path, children: Sequence[SavedChild], conflicts: Conflicts) -> Any:
    """The base model, loaded as it was trained, with the children on it."""
    model = _load(base, children[0])
    apply_child(model, *(child.folder for child in children), conflicts=conflicts)
    return model


def _load(base: str | Path, child: SavedChild) -> Any:
    """The base model in the class, config and dtypes that the child was trained in."""
    try:
        import transformers
    except ImportError:
        raise RuntimeError("expected transformers, got none. Remedy: pip install transformers.") from None
    info = ExportInfo.of(child.manifest, child.folder)
    cls: Any = getattr(transformers, info.model_class, None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if info.model_config is None or not known:
        raise ValueError(
            f"{child.folder}: expected a model class of transformers, got {info.model_class[:80]!r}."
            " Remedy: build the base model yourself, and call ds_childtune.apply_child(model, path)."
        )
    dtypes = {p.name: DTYPES[p.dtype] for p in child.manifest.parameters}
    floating = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    try:
        config = cls.config_class.from_dict(json.loads(info.model_config))
        # Of several dtypes each tensor has its own; until it is known, all are fp32.
        model: Any = cls.from_pretrained(
            base, config=config, dtype=floating.pop() if len(floating) == 1 else torch.float32
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{base}: expected saved weights for {info.model_class} as {child.folder} configures it, got"
            f" {type(error).__name__}: {str(error)[:300]} Remedy: give the folder or hub name of the child's base model."
        ) from error
    for name, tensor in {**dict(model.named_parameters()), **persistent_buffers(model)}.items():
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    return model

"""The files of a child: what is in them. Elements are named in a way that depends on no world size and no ZeRO stage.

[Note: child files]
A folder holds one `child.json`, the *manifest*, and safetensors files, one for each rank that has something to write:

    child.json                               written last: without it the folder is not a child; it says where which piece lies,
                                             see [Note: holders]
    child-00000-5f1c0a9be2d47c33.safetensors rank 0's pieces; the name ends with the contents' checksum
    child-00001-90d2b7a41e6c5f08.safetensors

A *piece* is a run of consecutive elements of one flattened parameter - (parameter name, first element, number of elements) -
with those of them that are inside the child, and values for each of these (weights, moments). Inside a safetensors file:

    "h.0.attn.weight@1024/mask"     uint8: one bit for each element, lowest bit first; or
    "h.0.attn.weight@1024/index"    int32 or int64: the child's elements, ascending, counted from the piece's first element;
                                    whichever is smaller. Neither of them: the whole piece is inside the child
    "h.0.attn.weight@1024/values"   one entry for each element inside the child, in their order; any number of such tensors

and under the header's `__metadata__`, key "pieces", a json list of `PieceEntry`. The pieces of a parameter never overlap, and cover
it: so a reader can ask for any run of elements, whichever rank wrote them.

Version 1, which is still read, has no holders: a reader looks into every file first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, cast

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from ds_childtune.child.child_shard import index_dtype
from ds_childtune.child_files.holders import Holders

FORMAT: Final = "ds_childtune"
VERSION = 2
READABLE = (1, 2)
MANIFEST = "child.json"

MAX_NUMEL = 2**62
"""Far above any parameter, and sums of two still fit int64."""

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""What tensors of a piece may be, by name."""

_Count = Annotated[int, Field(ge=0, le=MAX_NUMEL)]
_DtypeName = Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
_TensorName = Annotated[str, Field(pattern="^[A-Za-z0-9_.]+$", max_length=200)]
_PIECES = re.compile(r"child-(\d{5,18})-[0-9a-f]{16}\.safetensors")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

T = TypeVar("T")


class ChildFileError(ValueError):
    """A folder or file that is not a whole child, or not the child that was expected. Says what was expected, got, and a remedy."""


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter of the model."""

    __pydantic_config__ = _STRICT

    name: str
    """First name, as in `model.named_parameters()`."""
    shape: Annotated[tuple[_Count, ...], Field(max_length=64)]
    dtype: _DtypeName
    """Of the model that was trained."""
    stored: bool
    """True: pieces cover it. False: there are none."""

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file of the folder."""

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+\.safetensors$", max_length=200)]
    """Without a folder."""
    bytes: _Count
    blake2b: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """Checksum of the contents: blake2b of 16 bytes, in hexadecimal."""

    @property
    def writer(self) -> int | None:
        """The rank that wrote it, if it is a file of pieces."""
        found = _PIECES.fullmatch(self.name)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Manifest:
    """`child.json`. See [Note: child files]."""

    __pydantic_config__ = _STRICT

    library: str
    """Version of ds_childtune that wrote it."""
    kind: Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=40)]
    """What it is for, for example "export"."""
    config: dict[str, Any]
    """The "child_tuning" block."""
    parameters: tuple[ParameterEntry, ...]
    files: tuple[FileEntry, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """What this kind has besides; plain json."""
    format: Literal["ds_childtune"] = "ds_childtune"
    version: int = 1
    holders: Holders | None = None
    """Which files have pieces of which parameters. None: in version 1, or where it is otherwise than [Note: holders] says."""

    def with_holders(self, holders: Holders | None) -> Manifest:
        """Of the version that has them."""
        return self if holders is None else replace(self, version=VERSION, holders=holders)

    def json(self) -> bytes:
        # Without the key where there is none: seals of version 1 are over such a text.
        return adapter(Manifest).dump_json(self, indent=1, exclude={"holders"} if self.holders is None else None)


@dataclass(frozen=True)
class PieceEntry:
    """What the header of a safetensors file says about a piece."""

    __pydantic_config__ = _STRICT

    parameter: str
    start: _Count
    """First element, in the flattened parameter."""
    numel: _Count
    kept: _Count
    """How many of them are inside the child."""
    mask: Literal["all", "bits", "index"]
    tensors: dict[_TensorName, _DtypeName] = field(default_factory=dict)
    """Their names and dtypes."""
    numbers: dict[_TensorName, int | float] = field(default_factory=dict)
    """What the piece has one of, for example the step count of its optimizer state."""

    @property
    def end(self) -> int:
        return self.start + self.numel

    def key(self, what: str) -> str:
        """Name of one of its tensors in the file."""
        return f"{self.parameter}@{self.start}/{what}"


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements, and what is known of those inside the child."""

    parameter: str
    start: int
    """First element, in the flattened parameter."""
    numel: int
    index: Tensor | None
    """int32 or int64 1-D, ascending: the elements inside the child, counted from `start`. None: all of them."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """1-D, one entry for each element inside the child."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """What the piece has one of."""

    @classmethod
    def of(cls, parameter: str, start: int, mask: Tensor, **tensors: Tensor) -> Piece:
        """From a mask (bool 1-D, True = inside the child), and tensors of the mask's shape, of which the child's entries are taken."""
        whole = bool(mask.all())
        index = None if whole else torch.nonzero(mask).view(-1)
        taken = {name: t if index is None else t.index_select(0, index) for name, t in tensors.items()}
        index = None if index is None else index.to(index_dtype(mask.numel()))
        return cls(parameter, start, mask.numel(), index, taken)

    @property
    def kept(self) -> int:
        """Elements inside the child."""
        return self.numel if self.index is None else self.index.numel()

    @property
    def end(self) -> int:
        return self.start + self.numel

    def mask(self) -> Tensor:
        """bool [numel]: True = inside the child."""
        if self.index is None:
            return torch.ones(self.numel, dtype=torch.bool)
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.index.device)
        mask[self.index.long()] = True
        return mask

    def bounds(self, start: int, end: int) -> tuple[int, int]:
        """Which entries of the tensors belong to the parameter's elements [start, end), as a slice."""
        first, last = (min(max(at, self.start), self.end) - self.start for at in (start, end))
        if self.index is None:
            return first, last
        at = torch.tensor([first, last], dtype=self.index.dtype, device=self.index.device)
        first, last = torch.searchsorted(self.index, at).tolist()
        return first, last

    def narrow(self, start: int, end: int) -> Piece:
        """Those of its elements that are in [start, end) of the parameter."""
        first, last = self.bounds(start, end)
        start, end = (min(max(at, self.start), self.end) for at in (start, end))
        index = None if self.index is None else self.index[first:last] - (start - self.start)
        tensors = {name: tensor[first:last] for name, tensor in self.tensors.items()}
        return Piece(self.parameter, start, end - start, index, tensors, self.numbers)


def seal(manifest: Manifest) -> Manifest:
    """With the checksum of all the rest under the key `seal` of `extra`: a flipped bit may leave a number a number."""
    bare = replace(manifest, extra={key: value for key, value in manifest.extra.items() if key != "seal"})
    digest = hashlib.blake2b(bare.json(), digest_size=16).hexdigest()
    return replace(bare, extra={**bare.extra, "seal": digest})


def check_seal(manifest: Manifest, folder: Path) -> None:
    """Raise ChildFileError unless the manifest is as it was sealed."""
    if manifest.extra.get("seal") != seal(manifest).extra["seal"]:
        raise ChildFileError(
            f"{folder / MANIFEST}: expected the checksum that it was written with, got another: bytes have changed."
            " Remedy: write the child again, or take an undamaged copy."
        )


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What validates and writes a dataclass of this module; made once, as that takes longer than its use."""
    made: TypeAdapter[Any] = TypeAdapter(kind)
    return made


def parse(kind: type[T], data: bytes | str, where: str) -> T:
    """A dataclass of this module from json.

    Raises:
        ChildFileError: naming the first entry that is not as it should be.
    """
    try:
        value: T = adapter(cast(Any, kind)).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(p) for p in first["loc"])[:120] or "json"
        got = repr(first["input"])
        raise ChildFileError(
            f"{where}: {path}: expected otherwise ({first['msg']}), got {got[:80]}{'...' if len(got) > 80 else ''}."
            " Remedy: write the child again, or take an undamaged copy."
        ) from None
    return value

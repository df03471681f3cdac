"""A child as inference servers take it: applied by readers that are written here from the formats, 0 bits are different."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import ds_childtune
from ds_childtune import CheckpointWeightPatch
from ds_childtune.__main__ import app
from ds_childtune.child_files.convert import to_sglang, to_vllm
from ds_childtune.child_files.format import ParameterEntry, Piece
from ds_childtune.child_files.patches import patch_of
from tests.support.engines import Optimizer, Setup, Weights, engine_of, train_step
from tests.support.exporting import base_model
from tests.support.models import batches, deal
from tests.support.ranks import RankPool

Patches = list[CheckpointWeightPatch]

SLOW = Optimizer(params={"lr": 1e-4, "eps": 1e-3, "torch_adam": True})
"""Some weights in bf16 stay as they are in a step of it."""

SETUPS = [
    Setup(stage=0),
    Setup(stage=2, bf16=True, optimizer=SLOW),
    Setup(stage=3, bf16=True, optimizer=SLOW, sub_group_size=200),
]


# ---------------------------------------------------------------- reference readers


def vllm_call(weights: Weights, patches: Patches) -> Weights:
    """What one call of vLLM's loader does: sparse patches through a tensor of NaN, or dense ones."""
    assert len({p.indices is None for p in patches}) <= 1, "dense and sparse patches in one call"
    weights = dict(weights)
    for name, shape, dtype, values, indices in patches:
        assert weights[name].dtype == dtype
        assert tuple(weights[name].shape) == shape
        assert values.dtype == dtype
        assert values.dim() == 1
        if indices is None:
            weights[name] = values.view(shape)
            continue
        assert indices.dtype in (torch.int32, torch.int64)
        assert len(set(indices.tolist())) == len(indices)
        assert not values.isnan().any()
        flat = torch.full((weights[name].numel(),), float("nan"), dtype=dtype)
        flat[indices.long()] = values
        weights[name] = torch.where(flat.view(shape).isnan(), weights[name], flat.view(shape))
    return weights


def pull(local: Path, version_dir: Path, version: int) -> int:
    """What a host of SGLang's does with a delta: patch the safetensors files of `local` in place. Returns how many bytes."""
    import zstandard

    index = json.loads((version_dir / "model.safetensors.index.json").read_text())
    about = index["metadata"]
    assert (int(about["version"]), int(about["base_version"])) == (version, version - 1)
    assert (about["delta_encoding"], about["compression_format"]) == ("overwrite", "zstd")
    assert about["checksum_format"] == "adler32"
    places: dict[str, tuple[Path, int, int]] = {}
    for path in local.glob("*.safetensors"):
        header, data = read_header(path)
        for name, info in header.items():
            if name != "__metadata__":
                first, last = info["data_offsets"]
                places[name] = (path, data + first, last - first)
    written, names = 0, set()
    for path in version_dir.glob("*.safetensors"):
        checksums = read_header(path)[0]["__metadata__"]
        for name, blob in load_file(path).items():
            assert index["weight_map"][name] == path.name
            names.add(name)
            delta = zstandard.ZstdDecompressor().decompress(blob.numpy().tobytes())
            (count,) = struct.unpack("<I", delta[:4])
            positions = np.frombuffer(delta[4 : 4 + 4 * count], "<u4")
            home, offset, size = places[name]
            contents = np.fromfile(home, np.uint8)
            tensor = contents[offset : offset + size]
            tensor[positions] = np.frombuffer(delta[4 + 4 * count :], np.uint8)
            assert f"{zlib.adler32(tensor.tobytes()):08x}" == checksums[name]
            contents.tofile(home)
            written += count
    assert names == set(index["weight_map"])
    return written


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the byte at which its tensors begin."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[n].dtype and torch.equal(a.view(torch.uint8), other[n].view(torch.uint8))
        for n, a in one.items()
    )


# ---------------------------------------------------------------- a child that is published twice


def publish(setup: Setup, folder: str, optimizer_state: str) -> dict[str, Patches]:
    """Two versions of one child as exports, and the patches that were made of it while it trained."""
    with engine_of(setup) as engine:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        block = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": optimizer_state}
        child = ds_childtune.attach(engine, block)
        child.select(deal(batches(setup.family, 4), rank, world_size))
        made: dict[str, Patches] = {}
        for version in (1, 2):
            train_step(engine, deal(batches(setup.family, world_size, seed=version), rank, world_size))
            child.export(f"{folder}/v{version}")
            made[f"v{version}"] = list(child.patches())
        made["since"] = list(child.patches(since=f"{folder}/v1"))
        made["since, in memory"] = list(child.patches(since=made["v1"]))
        made["whole"] = list(child.patches(only="whole"))
        made["partial"] = list(child.patches(only="partial"))
        return made


def weights_with(setup: Setup, path: Path | None) -> Weights:
    """The base model, with a child of `apply_child` on it."""
    model = base_model(setup)
    if path is not None:
        ds_childtune.apply_child(model, path)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def count(patches: Patches) -> int:
    return sum(p.values.numel() for p in patches)


def alike(one: Patches, other: Patches) -> bool:
    """In whatever order."""
    if sorted(p.name for p in one) != sorted(p.name for p in other):
        return False
    others = {p.name: p for p in other}
    return all(
        (p.shape, p.dtype) == (others[p.name].shape, others[p.name].dtype)
        and torch.equal(p.values.view(torch.uint8), others[p.name].values.view(torch.uint8))
        and (p.indices is None) == (others[p.name].indices is None)
        and (p.indices is None or torch.equal(p.indices, others[p.name].indices))  # type: ignore[arg-type]
        for p in one
    )


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_patches_and_versions_give_the_tuned_model(pool: RankPool, setup: Setup, tmp_path: Path) -> None:
    one, other = pool[2].run(publish, setup, str(tmp_path), "compact" if setup.stage == 3 else "dense")
    exports = {version: ds_childtune.open_child(tmp_path / version) for version in ("v1", "v2")}
    for kind in one:
        assert alike(one[kind], other[kind]), "ranks have made other patches"
    for version, export in exports.items():
        assert alike(one[version], list(export.patches()))
    assert alike(one["since"], one["since, in memory"])
    assert alike(one["since"], list(exports["v2"].patches(since=exports["v1"])))
    assert alike(one["whole"], list(exports["v2"].patches(only="whole")))

    base = weights_with(setup, None)
    first, second = (weights_with(setup, tmp_path / version) for version in ("v1", "v2"))
    assert not same_bits(base, first), "vacuous: the child has not moved"
    assert not same_bits(first, second), "vacuous: both versions are alike"
    assert same_bits(vllm_call(base, one["v1"]), first)
    assert same_bits(vllm_call(base, one["v2"]), second)
    assert same_bits(vllm_call(first, one["since"]), second)
    assert same_bits(vllm_call(vllm_call(base, one["whole"]), one["partial"]), second)
    assert 0 < len(one["whole"]) < len(one["v2"]) == len(one["whole"]) + len(one["partial"])
    if setup.bf16:
        assert 0 < count(one["since"]) < count(one["v2"]), "what has not changed was sent"

    # The same child as files: patches, and the versions of a folder.
    file = to_vllm(tmp_path / "v2", tmp_path / "patches", since=tmp_path / "v1")
    assert same_bits(vllm_call(first, read_patches(file)), second)
    saved, local, output = tmp_path / "base", tmp_path / "local", tmp_path / "versions"
    base_model(setup).save_pretrained(saved)  # type: ignore[operator]
    shutil.copytree(saved, local)
    assert to_sglang(tmp_path / "v1", saved, output) == output / "weight_v000001"
    assert to_sglang(tmp_path / "v2", saved, output, since=tmp_path / "v1") == output / "weight_v000002"
    for version, tuned in enumerate((first, second), start=1):
        assert pull(local, output / f"weight_v{version:06d}", version) > 0
        found = load_file(local / "model.safetensors")
        assert same_bits(found, {name: tuned[name] for name in found})
    assert sorted(p.name for p in output.iterdir()) == ["weight_v000001", "weight_v000002"]


def read_patches(path: Path) -> Patches:
    """With safetensors only, as a server without ds_childtune reads the file."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["patches"])
        return [
            CheckpointWeightPatch(
                name,
                tuple(tensor["shape"]),
                getattr(torch, tensor["dtype"]),
                file.get_tensor(f"{name}/values"),
                file.get_tensor(f"{name}/indices"),
            )
            for name, tensor in about.items()
        ]


# ---------------------------------------------------------------- what cannot be a patch


def entry(numel: int = 4, dtype: str = "float32") -> ParameterEntry:
    return ParameterEntry("w", (numel,), dtype, True)


def piece(values: Tensor, index: list[int] | None = None) -> Piece:
    where = None if index is None else torch.tensor(index, dtype=torch.int32)
    return Piece("w", 0, 4, where, {"values": values})


def test_minus_zero_and_changes_of_bits_only_are_sent() -> None:
    zero = piece(torch.tensor([0.0, 1.0]), [1, 3])
    minus = piece(torch.tensor([-0.0, 1.0]), [1, 3])
    patch = patch_of(entry(), minus, before=zero)
    assert patch is not None
    assert patch.indices is not None
    assert patch.indices.tolist() == [1]
    assert str(patch.values.item()) == "-0.0"
    assert patch_of(entry(), zero, before=zero) is None


def test_what_a_sparse_patch_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="1 NaN"):
        patch_of(entry(), piece(torch.tensor([1.0, float("nan")]), [1, 3]))
    numbers = piece(torch.arange(4))
    with pytest.raises(ValueError, match=r'Remedy: make patches\(only="whole"\) and patches\(only="partial"\)'):
        patch_of(entry(dtype="int64"), numbers)
    whole = patch_of(entry(dtype="int64"), numbers, only="whole")  # the remedy
    assert whole is not None
    assert whole.indices is None
    assert patch_of(entry(dtype="int64"), numbers, only="partial") is None
    for other in (piece(torch.ones(2), [0, 3]), piece(torch.ones(4)), piece(torch.ones(2).double(), [1, 3])):
        with pytest.raises(ValueError, match="an earlier version of the same child"):
            patch_of(entry(), piece(torch.ones(2), [1, 3]), before=other)


# ---------------------------------------------------------------- what cannot be converted


def test_earlier_patches_have_to_be_all_on_every_rank(pool: RankPool) -> None:
    """Rank 1 has lost one of them: no rank waits for it, and the remedy works."""
    for said, numel in pool[2].run(since_some):
        assert said.startswith("[rank 1] ")
        assert "Remedy: leave `since` out" in said
        assert numel


def since_some() -> tuple[str, int]:
    with engine_of(SETUPS[0]) as engine:
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": 0.3, "selector": "random"})
        child.select()
        with pytest.raises(ValueError, match="since") as error:
            list(child.patches(since=list(child.patches())[dist.get_rank() :]))
        numel = sum(patch.values.numel() for patch in child.patches())
        child.detach()
    return str(error.value), numel


@pytest.fixture(scope="module")
def exported(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with v1, v2 and base."""
    folder = tmp_path_factory.mktemp("exported")
    pool[1].run(publish, SETUPS[0], str(folder), "dense")
    base_model(SETUPS[0]).save_pretrained(folder / "base")  # type: ignore[operator]
    return folder


def test_another_base_model_is_refused(exported: Path, tmp_path: Path) -> None:
    other = base_model(replace(SETUPS[0], bf16=True))
    other.save_pretrained(tmp_path / "bf16")  # type: ignore[operator]
    with pytest.raises(ValueError, match="Remedy: save the base model in float32"):
        to_sglang(exported / "v1", tmp_path / "bf16", tmp_path / "out")
    tensors = load_file(exported / "base" / "model.safetensors")
    (tmp_path / "moved").mkdir()
    save_file({name: t + 1 for name, t in tensors.items()}, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(ValueError, match="outside the child"):
        to_sglang(exported / "v1", tmp_path / "moved", tmp_path / "out")
    (tmp_path / "renamed").mkdir()
    renamed = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors")
    with pytest.raises(ValueError, match=r"Remedy: save the base model with save_pretrained"):
        to_sglang(exported / "v1", tmp_path / "renamed", tmp_path / "out")
    with pytest.raises(ValueError, match="Remedy: write one with save_pretrained"):
        to_sglang(exported / "v1", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_command_line(exported: Path, tmp_path: Path) -> None:
    def convert(child: str, *more: str) -> Any:
        return CliRunner().invoke(app, ["convert", str(exported / child), str(tmp_path / "out"), *more])

    base = ["--base", str(exported / "base")]
    said = convert("v1", "--to", "vllm", *base)
    assert "leave out --base" in str(said.exception)
    assert "pass --base" in str(convert("v1", "--to", "sglang").exception)
    said = convert("v2", "--to", "sglang", *base, "--since", str(exported / "v1"))
    assert "Remedy: leave --since out" in str(said.exception)
    assert convert("v1", "--to", "sglang", *base).exit_code == 0
    said = convert("v2", "--to", "sglang", *base)
    assert "Remedy: pass --since, the export that the last version was made of" in str(said.exception)
    said = convert("v2", "--to", "sglang", *base, "--since", str(exported / "v1"))
    assert said.exit_code == 0
    assert "weight_v000002" in said.output
    assert convert("v1", "--to", "vllm").exit_code == 0
    assert len(read_patches(tmp_path / "out" / "patches.safetensors")) > 0

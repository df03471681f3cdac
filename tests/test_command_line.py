"""The command line, in this process: what it prints, as tables and as json, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import ds_childtune
from ds_childtune.__main__ import app
from ds_childtune.planning.model import ModelOutline
from ds_childtune.zero.compact_parts import CompactParts, compact_parts
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.settings import Settings
from ds_childtune.zero.supported import REFUSALS, refused_in
from tests.support.engines import Setup, engine_of
from tests.support.models import build
from tests.support.ranks import RankPool

D = {"mode": "ChildTuning-D", "reserve_p": 0.1}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "child_tuning": D,
}


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words: object) -> Any:
    """The json that a command prints."""
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def written(folder: Path, config: Mapping[str, Any], name: str = "ds_config") -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config.json, without weights."""
    folder = tmp_path_factory.mktemp("bert")
    model: Any = build("bert")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- check


def test_check_says_what_trains(bert: Path, tmp_path: Path) -> None:
    """Compared with `eligible`, by hand: the blocks of an encoder, in a model that has weights."""
    config = written(tmp_path, CONFIG)
    found = answer("check", config, "--model", bert)
    sizes = {name: p.numel() for name, p in build("bert").named_parameters()}
    blocks = sum(numel for name, numel in sizes.items() if ".layer." in name)
    everything = sum(sizes.values())
    assert 0 < blocks < everything, "vacuous"
    model = found["model"]
    assert (model["elements"], model["eligible"]) == (everything, blocks)
    assert model["kept"] == round(0.1 * blocks)
    assert model["trained"] == round(0.1 * blocks) + everything - blocks
    assert model["trained_share"] == model["trained"] / everything
    assert model["groups"][0]["role"] == "dense", "most is taken by what is not eligible"
    text = invoke("check", config, "--model", bert / "config.json").stdout
    assert f"{model['trained']:,} elements" in text
    assert "word_embeddings" in text


def test_check_with_everything_else_frozen(bert: Path, tmp_path: Path) -> None:
    config = written(tmp_path, CONFIG | {"child_tuning": D | {"others": "frozen"}})
    model = answer("check", config, "--model", bert)["model"]
    assert model["trained"] == model["kept"] < model["eligible"]


def test_check_counts_tied_parameters_once() -> None:
    outline = ModelOutline.of(build("gpt2"), ds_childtune.ChildTuningConfig(mode="ChildTuning-F", reserve_p=0.3))
    assert outline.numel == sum(p.numel() for p in build("gpt2").parameters())
    assert outline.eligible_numel == outline.numel


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "hpZ"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "Super"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"optimizer": {"type": "Muon"}}, "Muon"),
        ({"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
        (
            {
                "bf16": {"enabled": False},
                "fp16": {"enabled": True},
                "zero_optimization": {"stage": 0},
                "optimizer": {"type": "Adam", "legacy_fusion": True},
            },
            "legacy optimizer fusion",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_check_refuses(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    result = invoke("check", written(tmp_path, CONFIG | changes))
    assert result.exit_code == 1
    [line] = [line for line in result.stdout.splitlines() if line.startswith("REFUSED")]
    assert words in line
    assert "Remedy: " in line
    assert not refused_in(ConfigReading(CONFIG)), "vacuous"


def test_every_refusal_that_a_config_shows_is_tested() -> None:
    seen = [r for r in REFUSALS if r.in_config is not None]
    cases = next(
        mark
        for mark in test_check_refuses.pytestmark
        if mark.name == "parametrize"  # type: ignore[attr-defined]
    ).args[1]
    reached = {
        r.what for r in seen for changes, _ in cases if r.in_config and r.in_config(ConfigReading(CONFIG | changes))
    }
    assert reached == {r.what for r in seen}


def test_check_says_which_checkpoints_are_refused(tmp_path: Path) -> None:
    """They are no reason for `attach` to refuse."""
    blocks = {"load_universal": True, "writer": {"type": "fast", "decoupled": True}, "use_node_local_storage": True}
    config = CONFIG | {"checkpoint": blocks, "zero_optimization": {"stage": 2, "elastic_checkpoint": True}}
    found = answer("check", written(tmp_path, config))
    assert found["works"]
    for word in ("universal", "decoupled", "node-local", "elastic_checkpoint"):
        assert any(word in text and "Remedy" in text for text in found["checkpoints_refused"]), word


def test_check_says_how_much_is_compact(tmp_path: Path) -> None:
    compact = CONFIG | {"child_tuning": D | {"optimizer_state": "compact"}}
    found = answer("check", written(tmp_path, compact))
    assert 'unless child_tuning.clip is "child"' in found["compact"]
    assert not found["lean_start"]
    deep = CONFIG | {"child_tuning": D | {"optimizer_state": "compact", "clip": "child"}}
    found = answer("check", written(tmp_path, deep))
    assert found["compact"].startswith("moments, masters and gradients")
    assert found["lean_start"]


def test_check_names_the_keys_that_the_trainer_fills_in(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto"}
    config = CONFIG | {"gradient_clipping": "auto", "zero_optimization": zero}
    found = answer("check", written(tmp_path, config))
    assert set(found["auto"]) == {"gradient_clipping", "zero_optimization.reduce_bucket_size"}
    assert {"gradient_clipping": "1"}.items() <= {k["name"]: k["value"] for k in found["keys"]}.items()


def test_wrong_files_are_said_in_a_line(tmp_path: Path, bert: Path) -> None:
    broken, listed = tmp_path / "broken.json", tmp_path / "list.json"
    broken.write_text("{")
    listed.write_text("[]")
    right = written(tmp_path, CONFIG)
    typo = written(tmp_path, CONFIG | {"child_tuning": D | {"reserv_p": 1}}, "typo")
    stage = written(tmp_path, {"zero_optimization": {"stage": 7}, "child_tuning": D}, "stage")
    for words in (
        ("check", tmp_path / "none.json"),
        ("check", broken),
        ("check", listed),
        ("check", typo),
        ("check", stage),
        ("check", right, "--model", tmp_path / "none"),
        ("check", right, "--model", bert, "--model-class", "NoSuchModel"),
    ):
        error = invoke(*words).exception
        assert isinstance(error, ValueError), words
        assert "Remedy: " in str(error)
        assert "\n" not in str(error)


# ---------------------------------------------------------------- a config and its engine agree

SETUPS = {
    f"stage {stage}{name}": replace(setup, stage=stage)
    for stage in range(4)
    for name, setup in {
        "": Setup("odd"),
        ", bf16": Setup("odd", bf16=True),
        ", clipped": Setup("odd", bf16=True, clip=1.0),
        ", offload": Setup("odd", bf16=True, offload=True),
        ", bf16 and fp32": Setup("odd", bf16=True, fp32_accumulation=True),
    }.items()
    if stage or name not in (", offload", ", bf16 and fp32")
}


def settings_of_engines() -> dict[str, tuple[Settings, str]]:
    found = {}
    for name, setup in SETUPS.items():
        with engine_of(setup) as engine:
            found[name] = Settings.of_engine(engine), CompactParts.of(engine, None).text
    return found


def test_a_config_is_read_as_its_engine_is(pool: RankPool) -> None:
    [found] = pool[1].run(settings_of_engines)
    assert len({settings for settings, _ in found.values()}) > 8, "vacuous"
    for name, (settings, text) in found.items():
        expected = Settings.of_config(ConfigReading(SETUPS[name].config()))
        assert expected == settings, name
        assert compact_parts(expected, None)[1] == text, name

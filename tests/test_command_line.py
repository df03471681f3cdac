"""The command line, in this process: what it prints, as tables and as json, and its exit codes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from click.testing import Result
from typer.testing import CliRunner

import ds_childtune
from ds_childtune.__main__ import app, main
from ds_childtune.checkpoint.given import locate_child
from ds_childtune.child_files.export_info import ExportInfo
from ds_childtune.child_files.fingerprint import bits
from ds_childtune.child_files.reader import open_child
from ds_childtune.commands.plots import Cell, HeatMap, density_cells
from ds_childtune.config import parse_config
from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.plan import Planned
from ds_childtune.zero.compact_parts import Compactness, CompactParts, compact_parts
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.settings import Settings
from ds_childtune.zero.supported import REFUSALS, refused_in
from tests.benchmarks.plan import BLOCKS, beside, config_of, error, llama, measure, predict
from tests.benchmarks.plan import build as llama_model
from tests.support.documentation import prepare
from tests.support.engines import Setup, engine_of, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

SMALL = llama(hidden=64, layers=2, inner=176, vocabulary=4000)
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


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    SMALL.architectures = ["LlamaForCausalLM"]
    SMALL.save_pretrained(folder)
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
    assert "gradient_clipping" in found["lean_start_reason"]
    stage_2 = {"child_tuning": D | {"optimizer_state": "compact", "clip": "child"}, "zero_optimization": {"stage": 2}}
    assert (
        answer("check", written(tmp_path, CONFIG | stage_2))["lean_start_reason"] == "zero_optimization.stage is not 3"
    )
    assert "cannot be used: zero_optimization.stage" in invoke("check", tmp_path / "ds_config.json").output
    deep = CONFIG | {"child_tuning": D | {"optimizer_state": "compact", "clip": "child"}}
    found = answer("check", written(tmp_path, deep))
    assert found["compact"].startswith("moments, masters and gradients")
    assert found["lean_start"]
    assert found["lean_start_reason"] is None


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


@pytest.mark.parametrize(
    ("words", "code", "kind", "says"),
    [
        (["check", "none.json"], 1, "ValueError", "Remedy: correct the path or the file"),
        (["inspect", "none"], 1, "ChildFileError", "none"),
        (["plan"], 2, "MissingParameter", "Missing argument"),
        (["chekc", "none.json"], 2, "UsageError", "chekc"),
    ],
)
def test_errors_are_json_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    code: int,
    kind: str,
    says: str,
) -> None:
    """One object on stdout and nothing else anywhere, with the exit code that there is without."""
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["ds_childtune", *words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        printed = capsys.readouterr()
        if not more:
            assert printed.out == ""
            assert says in printed.err
            continue
        assert printed.err == ""
        error = json.loads(printed.out)["error"]
        assert error["type"] == kind
        assert says in error["message"]


def test_json_keeps_the_exit_codes_of_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    onebit = {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 0}}
    refused = written(tmp_path, CONFIG | onebit, "refused")
    for config, code in ((written(tmp_path, CONFIG), None), (refused, 1)):
        monkeypatch.setattr(sys, "argv", ["ds_childtune", "check", str(config), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert json.loads(capsys.readouterr().out)["works"] is (code is None)


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
    if stage or name != ", bf16 and fp32"
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
        assert compact_parts(expected, None).text == text, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_gradients_are_sent_where_a_config_asks(stage: int) -> None:
    def found(sends: Literal["child", "whole"], **zero: Any) -> Compactness:
        config = {"zero_optimization": {"stage": stage, **zero}, "gradient_clipping": 0.0}
        return compact_parts(Settings.of_config(ConfigReading(config)), None, sends)

    assert found("child").sends_child
    whole = found("whole")
    assert not whole.sends_child
    assert 'child_tuning.sends is "whole"' in whole.text
    assert whole.parts == ("moments, masters and gradients" if stage == 3 else "moments and masters")
    offloaded = [found(sends, offload_optimizer={"device": "cpu"}) for sends in ("child", "whole")]
    assert [each.sends_child for each in offloaded] == [stage < 3, False]
    assert "the child is sent, and moved between host and device" in offloaded[0].text or stage == 3
    assert offloaded[1].text.endswith("between host and device gradients and weights move whole")
    if stage == 3:
        quantized = found("child", zero_quantized_gradients=True)
        assert not quantized.sends_child
        assert "zero_quantized_gradients" in quantized.text


def test_at_zero_0_nothing_is_offloaded(llama_folder: Path, tmp_path: Path) -> None:
    """As of an engine, above; plan and the keys say so, too."""
    zero = {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    path = written(tmp_path, CONFIG | {"zero_optimization": zero})
    effects = {key["name"]: key["effect"] for key in answer("check", path)["keys"]}
    assert effects["zero_optimization.offload_optimizer"] == "nothing is offloaded at this stage"
    found, expected = (
        answer("plan", llama_folder, "--config", config)
        for config in (path, written(tmp_path, CONFIG | {"zero_optimization": {"stage": 0}}, "without"))
    )
    assert found == expected


# ---------------------------------------------------------------- plan


@pytest.mark.parametrize(
    ("stage", "kind", "offload", "sends"),
    [(2, "dense", False, ""), (3, "compact", False, ""), (2, "compact", True, "child"), (2, "compact", True, "whole")],
)
def test_plan_predicts_what_engines_hold(pool: RankPool, stage: int, kind: str, offload: bool, sends: str) -> None:
    """The larger set of set-ups, in which peaks are compared too, is tests/benchmarks/plan.py."""
    config = config_of(stage, offload=offload, gradient_accumulation_steps=2 if offload else 1)
    config["zero_optimization"]["reduce_bucket_size"] = 50_000
    block = everything_eligible(kind) | {"sends": sends} if offload else BLOCKS[kind]
    predicted = predict(SMALL, config, block)
    everyone = pool[2].run(measure, SMALL, config, block)
    assert {"start", "Fisher", "selection", "steps"} == predicted.keys() == everyone[0].keys()
    for name, phase in predicted.items():
        live = max(found[name][1] for found in everyone)
        assert abs(error(phase.live + beside(phase, phase.host), live)) < 0.05, name
    if sends == "child":  # the child is chosen beside the masters of all, which are the host's
        phase, top = predicted["selection"], max(found["selection"][0] for found in everyone)
        assert abs(error(phase.peak + beside(phase, phase.host_peak), top)) < 0.15
        assert abs(error(phase.peak + beside(phase, phase.host), top)) > 0.15, "vacuous"
    plain = predict(SMALL, config, None)["steps"]
    assert abs(error(plain.live + beside(plain, plain.host), max(found["steps"][1] for found in everyone))) > 0.05, (
        "vacuous: any plan would do"
    )


def everything_eligible(kind: str) -> dict[str, Any]:
    return {**(BLOCKS[kind] or {}), "include": ["*"]}


def written_bytes(stage: int, kind: str, folder: str) -> tuple[int, int]:
    """Of a checkpoint and of an export, after a step."""
    config = config_of(stage)
    model = llama_model(SMALL, config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    ids = torch.arange(16).view(1, -1)
    batch = {"input_ids": ids, "labels": ids}
    child = ds_childtune.attach(engine, everything_eligible(kind))
    child.select([batch])
    engine.backward(engine(**batch).loss)
    engine.step()
    engine.save_checkpoint(f"{folder}/saved")
    child.export(f"{folder}/child")
    child.detach()
    engine.destroy()
    checkpoint, export = (
        sum(path.stat().st_size for path in Path(folder, name).rglob("*") if path.is_file())
        for name in ("saved", "child")
    )
    return checkpoint, export


@pytest.mark.parametrize(("stage", "kind"), [(2, "dense"), (2, "compact"), (3, "compact")])
def test_plan_predicts_what_is_written(pool: RankPool, tmp_path: Path, stage: int, kind: str) -> None:
    config = config_of(stage)
    checkpoint, export = pool[2].run(written_bytes, stage, kind, str(tmp_path))[0]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(SMALL)
    child = parse_config(everything_eligible(kind))
    plan = Planned(ModelOutline.of(model, child), config, child, 2).plan()
    assert abs(error(plan.child.checkpoint, checkpoint)) < 0.05
    # Of an uneven child a sparse piece has an index, which is smaller than the bits that the plan counts.
    assert -0.05 < error(plan.child.export, export) < 0.4
    assert abs(error(plan.plain.checkpoint, checkpoint)) > 0.05 or kind == "dense", "vacuous"


def test_plan_by_hand(llama_folder: Path) -> None:
    """ZeRO-3 in bf16 with AdamW, 4 ranks: the bytes of each kind, counted by hand."""
    found = answer("plan", llama_folder, "--world-size", 4, "--reserve-p", 0.1, "--include", "*")
    with torch.device("meta"):
        sizes = [p.numel() for p in transformers.LlamaForCausalLM(SMALL).parameters()]
    shard = sum(-(-n // 4) for n in sizes)
    small = sum(n for n in sizes if n <= 100_000)
    assert 0 < small < sum(sizes), "vacuous"
    plain, child = (found[side]["phases"]["steps"]["kept"] for side in ("plain", "child"))
    assert (plain["weights"], plain["masters"]) == (2 * (shard + small), 4 * shard)
    assert (plain["moments"], plain["gradients"], plain["child"]) == (8 * shard, 2 * shard, 0)
    density = round(0.1 * sum(sizes)) / sum(sizes)
    inside = round(sum(density * -(-n // 4) for n in sizes))
    assert (child["masters"], child["moments"], child["gradients"]) == (4 * inside, 8 * inside, 2 * inside)
    masks = sum(4 * math.ceil(math.ceil(n / 4) / 8) for n in sizes)
    assert child["child"] == 4 * inside + masks, "an index, and a bit for each element of the model"
    assert (child["buckets"], plain["buckets"]) == (0, 2 * 500_000_000)
    sent, whole = found["child"]["sent_per_step"], found["plain"]["sent_per_step"]
    assert sent == {"gradients": round(0.75 * 2 * round(0.1 * sum(sizes))), "weights": whole["weights"]}
    assert whole["gradients"] == round(0.75 * 2 * sum(sizes))
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    config = written(llama_folder, config_of(3) | {"zero_optimization": zero}, "hpz")
    hpz = answer("plan", llama_folder, "--config", config, "--world-size", 4, "--reserve-p", 0.1, "--include", "*")
    large, trained = sum(sizes) - small, round(0.1 * sum(sizes))
    assert hpz["plain"]["sent_per_step"]["weights"] == round(0.75 * 2 * sum(sizes))
    assert hpz["child"]["sent_per_step"]["weights"] == round(0.75 * 2 * small + 2 * trained / 4), "to the other node"
    assert hpz["child"]["sent_per_step"]["weights, inside a node"] == round(0.5 * 2 * large + 2 * trained / 4)
    assert hpz["child"]["phases"]["steps"]["kept"]["weights"] == child["weights"] + 2 * 2 * shard
    one_rank = answer("plan", llama_folder, "--world-size", 1, "--reserve-p", 0.1, "--include", "*")
    kept = one_rank["child"]["phases"]["steps"]["kept"]
    assert kept["child"] == 8 * round(0.1 * sum(sizes)), (
        "an index, and places: every partition has few; nothing is sent"
    )
    assert kept["buckets"] == 2 * 500_000_000


@pytest.mark.parametrize("world_size", [1, 2, 64, 4096])
@pytest.mark.parametrize("stage", range(4))
def test_plan_of_any_world_size(llama_folder: Path, stage: int, world_size: int) -> None:
    found = answer("plan", llama_folder, "--stage", stage, "--world-size", world_size, "--include", "*")
    for side in ("plain", "child"):
        for phase in found[side]["phases"].values():
            assert phase["peak"] >= phase["live"] > 0
            assert all(kept >= 0 for kept in phase["kept"].values())
        assert (sum(found[side]["sent_per_step"].values()) == 0) == (world_size == 1)
    assert found["child"]["checkpoint"] < found["plain"]["checkpoint"]


@pytest.mark.parametrize("world_size", [2, 64])
def test_plan_where_one_rank_has_most_of_the_child(llama_folder: Path, tmp_path: Path, world_size: int) -> None:
    """Embeddings train in full and are on few ranks. What every rank has of the whole child does not grow with the ranks."""
    block = {"mode": "ChildTuning-D", "reserve_p": 0.1, "optimizer_state": "compact"}
    config = written(
        tmp_path, CONFIG | {"gradient_clipping": 0, "zero_optimization": {"stage": 2}, "child_tuning": block}
    )
    found = answer("plan", llama_folder, "--config", config, "--world-size", world_size)
    sizes = [p.numel() for p in transformers.LlamaForCausalLM(SMALL).parameters()]
    child, steps = found["model"]["trained"], found["child"]["phases"]["steps"]
    most = steps["kept"]["masters"] / 4
    assert (most > 1.1 * child / world_size) == (world_size == 64), "vacuous: as much on all ranks"
    assert 4 * most <= steps["kept"]["child"] <= 4 * most + sum(sizes) / 8 + world_size
    assert 2 * child <= steps["moments"]["backward"] <= 2 * 1.05 * child + 2 * max(sizes) + 4 * most


def test_what_plan_says_fits_does_fit(llama_folder: Path) -> None:
    """And the next larger p, fewer ranks, and lower stages do not."""
    small = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}, "bf16": {"enabled": True}}
    config = ("--config", written(llama_folder, small))

    def peak(*words: object) -> int:
        return int(answer("plan", llama_folder, *config, *words)["child"]["peak"])

    budget = peak("--world-size", 8, "--reserve-p", 0.5)
    fit = answer("plan", llama_folder, *config, "--world-size", 8, "--reserve-p", 0.1, "--fit", f"{budget}B")["fit"]
    p, ranks, stage = fit["largest_p"], fit["smallest_world_size"], fit["best_stage"]
    assert fit["fits"]
    assert peak("--world-size", 8, "--reserve-p", p) <= budget < peak("--world-size", 8, "--reserve-p", p + 0.002)
    assert peak("--world-size", ranks, "--reserve-p", 0.1) <= budget
    assert ranks == 1 or peak("--world-size", ranks // 2, "--reserve-p", 0.1) > budget
    lower = [peak("--stage", s, "--reserve-p", 0.1) for s in range(stage)]
    assert all(needed > budget for needed in lower)
    result = invoke("plan", llama_folder, *config, "--world-size", 8, "--fit", "1KiB")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout


def test_plan_refuses_what_it_does_not_know(llama_folder: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    offload = written(llama_folder, CONFIG | {"zero_optimization": zero}, "offload")
    for words in (("--optimizer", "Shampoo"), ("--fit", "much"), ("--config", offload), ("--reserve-p", 2)):
        error = invoke("plan", llama_folder, *words).exception
        assert isinstance(error, ValueError), words
        assert "Remedy: " in str(error)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_plan_takes_options_before_the_config(llama_folder: Path, dtype: str) -> None:
    config = written(llama_folder, CONFIG | {"child_tuning": D | {"optimizer_state": "compact"}}, "with_a_child")
    found = answer("plan", llama_folder, "--config", config, "--dtype", dtype, "--stage", 2, "--optimizer", "Lion")
    kept = found["plain"]["phases"]["steps"]["kept"]
    elements = found["model"]["elements"]
    assert found["plain"]["stage"] == 2
    assert kept["weights"] == {"bf16": 2, "fp32": 4}[dtype] * elements
    assert kept["moments"] == 4 * -(-elements // 8)
    assert found["child"]["compact"] == "moments and masters"


# ---------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def prepared(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two children and a checkpoint."""
    folder = tmp_path_factory.mktemp("prepared")
    pool[1].run(prepare, str(folder))
    return folder


def test_a_heat_map_is_of_layers_and_modules() -> None:
    cells = [
        Cell("model.layers.0.mlp.up.weight", 1, 10),
        Cell("model.layers.0.mlp.up.bias", 4, 10),
        Cell("model.layers.1.mlp.up.weight", 5, 10),
        Cell("model.layers.1.norm.weight", 2, 2),
        Cell("model.embed.weight", 3, 3),
    ]
    heat = HeatMap.of(cells)
    assert (heat.rows, heat.columns, heat.outside) == (("mlp.up", "norm"), (0, 1), {"model.embed": 1.0})
    assert heat.shares[0] == (0.25, 0.5)
    assert math.isnan(heat.shares[1][0])
    assert heat.shares[1][1] == 1.0
    two = HeatMap.of([Cell("encoder.block.0.a.weight", 1, 2), Cell("decoder.block.0.a.weight", 1, 2)])
    assert two.rows == ("encoder.block a", "decoder.block a")


@pytest.mark.parametrize("what", ["tasks/rte", "saved"])
def test_inspect_plots(prepared: Path, tmp_path: Path, what: str) -> None:
    """An export, and a checkpoint; the picture is of the shares that --json has."""
    result = invoke("inspect", prepared / what, "--plot", tmp_path / "child.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "child.png").read_bytes().startswith(b"\x89PNG")
    found = {p["name"]: p for p in answer("inspect", prepared / what)["parameters"]}
    heat = HeatMap.of(density_cells(open_child(locate_child(prepared / what, "test"))))
    assert len(heat.columns) == 2
    names = [name for name in found if ".layer.1." in name and "query" in name]
    kept, numel = (
        sum(values) for values in zip(*((found[n]["stored"], math.prod(found[n]["shape"])) for n in names), strict=True)
    )
    [row] = [shares for kind, shares in zip(heat.rows, heat.shares, strict=True) if "query" in kind]
    assert row[1] == kept / numel


def test_compare_plots(prepared: Path, tmp_path: Path) -> None:
    children = prepared / "tasks/rte", prepared / "tasks/mrpc"
    far = tmp_path / ("long" * 20) / ("way" * 20)
    shutil.copytree(prepared / "tasks", far)
    for tasks in (prepared / "tasks", far):  # long paths leave room for the picture
        assert invoke("compare", tasks / "rte", tasks / "mrpc", "--plot", tmp_path / "both.svg").exit_code == 0
        assert "<svg" in (tmp_path / "both.svg").read_text()[:1000]
    assert answer("compare", *children)["total"]["both"] > 0
    error = invoke("compare", *children, "--plot", tmp_path / "none" / "both.png").exception
    assert isinstance(error, ValueError)
    assert "Remedy" in str(error)


# ---------------------------------------------------------------- export


def trained_and_saved(setup: Setup, block: dict[str, Any], folder: str) -> None:
    """Train a child, and write it both ways; beside it the base model."""
    if dist.get_rank() == 0:
        build(setup.family).save_pretrained(f"{folder}/base")  # type: ignore[operator]
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        child.select(deal(batches(setup.family, 4), rank, ranks))
        for step in range(2):
            train_step(engine, deal(batches(setup.family, ranks, seed=step), rank, ranks))
        child.export(f"{folder}/child")
        engine.save_checkpoint(f"{folder}/saved")


@pytest.mark.parametrize("optimizer_state", ["dense", "compact"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("stage", [2, 3])
def test_export_of_a_checkpoint(pool: RankPool, tmp_path: Path, stage: int, bf16: bool, optimizer_state: str) -> None:
    """To the bit what `child.export` wrote in the run."""
    block = D | {"optimizer_state": optimizer_state}
    pool[2].run(trained_and_saved, Setup("bert", stage=stage, bf16=bf16, clip=0.0), block, str(tmp_path))
    words = ("--base", tmp_path / "base", "--json")
    result = invoke("export", tmp_path / "saved", tmp_path / "alone", *words)
    assert result.exit_code == 0, result.output
    one, other = (open_child(tmp_path / name, kind="export") for name in ("child", "alone"))
    assert one.manifest.parameters == other.manifest.parameters
    assert one.manifest.config == other.manifest.config
    infos = [ExportInfo.of(child.manifest, child.folder) for child in (one, other)]
    assert infos[0].fingerprints == infos[1].fingerprints
    assert (infos[0].step, infos[0].model_class) == (infos[1].step, infos[1].model_class)
    for name in one.stored:
        mine, theirs = one.read(name), other.read(name)
        assert torch.equal(mine.mask(), theirs.mask()), name
        assert torch.equal(bits(mine.tensors["values"]), bits(theirs.tensors["values"])), name
    assert any(one.kept(name) < one.parameters[name].numel for name in one.stored), "vacuous: nothing is masked"
    merged = invoke("merge", tmp_path / "base", tmp_path / "alone", "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output


def test_export_says_what_it_needs(prepared: Path, tmp_path: Path, bert: Path, llama_folder: Path) -> None:
    for checkpoint, base in (("tasks/rte", bert), ("bert-base", bert), ("saved", llama_folder)):
        error = invoke("export", prepared / checkpoint, tmp_path / "alone", "--base", base).exception
        assert isinstance(error, ValueError), checkpoint
        assert "Remedy" in str(error)
    assert not (tmp_path / "alone").exists()


def test_a_folder_of_checkpoints_or_a_checkpoint_in_place_of_an_export(prepared: Path, tmp_path: Path) -> None:
    """A Trainer's output_dir, and a checkpoint where only an export will do: what each error says to do works."""
    (tmp_path / "out").mkdir()
    shutil.copytree(prepared / "saved", tmp_path / "out/checkpoint-500")
    assert "for example checkpoint-500" in str(invoke("inspect", tmp_path / "out").exception)
    assert invoke("inspect", tmp_path / "out/checkpoint-500").exit_code == 0
    words = ("convert", tmp_path / "out/checkpoint-500", tmp_path / "published", "--to", "vllm")
    assert "`ds_childtune export` writes such a folder" in str(invoke(*words).exception)
    exported = ("export", tmp_path / "out/checkpoint-500", tmp_path / "child", "--base", prepared / "bert-base")
    assert invoke(*exported).exit_code == 0
    assert invoke("convert", tmp_path / "child", *words[2:]).exit_code == 0

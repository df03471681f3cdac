"""The main job and its recipes as people start them: one node, two nodes, OpenMPI, no compiler.

Two ranks train on the same batches however they were started, so every start must end with the same numbers. Two "nodes" are two
launchers on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ds_childtune
from tests.support.engines import train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SECONDS = 240.0
"""A run that is not done by then hangs; with two busy cores each takes about twenty seconds."""

WORDS = ["good", "fine", "bad", "poor", "film", "book", "song", "the", "a", "was"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and GPT-2 as transformers folders, and data: a text's first word says its label."""
    folder = tmp_path_factory.mktemp("launch")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]", model_max_length=32
    )
    bert = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    gpt2 = transformers.GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.set_seed(0)
    for name, model in (("bert", transformers.BertModel(bert)), ("gpt2", transformers.GPT2LMHeadModel(gpt2))):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    for name, count in (("train", 40), ("eval", 13)):
        rows = [
            {"text": f"{WORDS[i % 4]} {WORDS[4 + i % 3]} {'was the ' * (i % 5)}", "label": i % 4 // 2}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def job(folder: Path, results: Path, *more: str) -> list[str]:
    """Arguments of launch/finetune.py."""
    files = ["--train-file", f"{folder}/train.jsonl", "--eval-file", f"{folder}/eval.jsonl"]
    few = ["--batch-size", "4", "--max-steps", "4", "--lr", "0.01", "--max-length", "16"]
    return ["--model", f"{folder}/bert", *files, *few, "--results", str(results), *more]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **caches, **changes}


@contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, so that what it leaves behind can be ended with it."""
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output[-6000:]
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_launcher(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    return [*launcher, "--num_gpus", str(ranks)]


def launch(folder: Path, *arguments: str, ranks: int = 2, script: str = "launch/finetune.py", **changes: str) -> str:
    """Run a script under the deepspeed launcher, on one node."""
    with started([*deepspeed_launcher(ranks), script, *arguments], environment(folder, **changes)) as process:
        return output_of(process)


def only_result(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines()
    assert len(lines) == 1, "expected one line, written by rank 0"
    return json.loads(lines[0])  # type: ignore[no-any-return]


def checkpoints(folder: Path) -> list[str]:
    return ["--checkpoints", f"{folder}/checkpoints", "--save-every", "3"]


@pytest.fixture(scope="module")
def one_node(folder: Path) -> dict[str, Any]:
    """Two ranks under one launcher, on a machine without a compiler; the tuned model is saved."""
    no_compiler = folder / "bin"
    no_compiler.mkdir()
    for tool in ("bash", "env", "hostname", "python3", "uname"):
        found = shutil.which(tool)
        if found:
            (no_compiler / tool).symlink_to(found)
    path = os.pathsep.join([str(BIN), str(no_compiler)])
    assert shutil.which("g++", path=path) is None
    results = folder / "one_node.jsonl"
    arguments = job(folder, results, "--output", f"{folder}/tuned", "--export", f"{folder}/child", *checkpoints(folder))
    output = launch(folder, *arguments, PATH=path, CXX="/no/compiler", CC="/no/compiler")
    assert "accuracy" in output
    assert "density" in output
    assert output.count("are eligible (") == 1, "attach reports on rank 0 alone, whatever DeepSpeed's log level"
    assert output.count("ChildTuning-D: kept") == 1
    return only_result(results)


def same_training(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("train_loss", "metrics", "density", "steps", "world_size"))


def test_one_node_without_a_compiler(one_node: dict[str, Any], folder: Path) -> None:
    assert one_node["world_size"] == 2
    assert one_node["method"] == "ChildTuning-D"
    assert one_node["density"] == pytest.approx(one_node["ds_config"]["child_tuning"]["reserve_p"], abs=1e-3)
    assert one_node["seconds"]["fisher"] > 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tuned")
    assert model.num_labels == 2


def test_the_same_command_goes_on_from_the_last_checkpoint(one_node: dict[str, Any], folder: Path) -> None:
    """Which is of step 3 of 4: the last step, again, ends where the first run did."""
    results = folder / "resumed.jsonl"
    output = launch(folder, *job(folder, results, *checkpoints(folder)))
    resumed = only_result(results)
    assert same_training(resumed, one_node)
    assert resumed["seconds"]["fisher"] == 0, "vacuous: the child was chosen again"
    assert "Fisher" not in output


def test_the_exported_child_makes_the_tuned_model(one_node: dict[str, Any], folder: Path) -> None:
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tuned")
    applied = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    ds_childtune.apply_child(applied, folder / "child")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, applied.state_dict()[name]), name


def test_two_nodes_without_ssh(one_node: dict[str, Any], folder: Path) -> None:
    """launch/node_by_node.sh, on both of two nodes."""
    hostfile = folder / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    results = folder / "two_nodes.jsonl"
    address = {"HOSTFILE": str(hostfile), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["bash", "launch/node_by_node.sh", *job(folder, results)]
    with (
        started(command, environment(folder, NODE_RANK="0", **address)) as first,
        started(command, environment(folder, NODE_RANK="1", **address)) as second,
    ):
        output_of(second)
        output_of(first)
    assert same_training(only_result(results), one_node)


def test_openmpi(one_node: dict[str, Any], folder: Path) -> None:
    """launch/mpirun.sh: ranks from OpenMPI, found by DeepSpeed through mpi4py."""
    results = folder / "mpi.jsonl"
    mpi = ["--allow-run-as-root", "--oversubscribe", "-np", "2"]
    command = ["bash", "launch/mpirun.sh", *mpi, "--", *job(folder, results)]
    with started(command, environment(folder, MASTER_PORT=str(free_port()))) as process:
        output_of(process)
    assert same_training(only_result(results), one_node)


def test_side_by_side(folder: Path) -> None:
    """--compare trains plain and then the child; F's masks fall back to the eager kernel without a compiler."""
    results = folder / "compare.jsonl"
    arguments = job(folder, results, "--compare", "--method", "ChildTuning-F", "--reserve-p", "0.5")
    output = launch(folder, *arguments, ranks=1, CXX="/no/compiler", TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
    plain, child = map(json.loads, results.read_text().splitlines())
    assert (plain["method"], child["method"]) == ("plain", "ChildTuning-F")
    assert plain["train_loss"] != child["train_loss"], "vacuous: the mask made no difference"
    assert "eager kernel" in output


def test_regression_and_language_modelling(folder: Path) -> None:
    results = folder / "tasks.jsonl"
    regression = job(folder, results, "--task", "regression", "--method", "plain", "--group-by-length")
    launch(folder, *regression, ranks=1)
    language = job(folder, results, "--task", "causal-lm", "--model", f"{folder}/gpt2", "--text-columns", "text")
    launch(folder, *language)
    first, second = map(json.loads, results.read_text().splitlines())
    assert set(first["metrics"]) == {"pearson", "spearman", "mse"}
    assert 1 < second["metrics"]["perplexity"] < 14, "expected less than the vocabulary's size"


def test_a_wrong_file_is_one_readable_error(folder: Path) -> None:
    arguments = job(folder, folder / "none.jsonl", "--eval-file", f"{folder}/missing.jsonl")
    with started([*deepspeed_launcher(2), "launch/finetune.py", *arguments], environment(folder)) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "missing.jsonl, which is not there" in output


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_face_trainer(folder: Path, stage: int) -> None:
    """accelerate steps inside its backward, before any of Trainer's hooks: the masks must act all the same."""
    result = folder / f"trainer-{stage}.json"
    launch(folder, str(folder), str(stage), str(result), script="tests/support/trainer_job.py")
    answer = json.loads(result.read_text())
    assert answer["step"] == 3
    assert answer["density"] == pytest.approx(0.3, abs=1e-3)
    assert answer["outside moved"] == 0
    assert answer["inside moved"] > 0.5
    assert answer["resumed step"] == 3
    assert answer["resumed differs in"] == []


# ---------------------------------------------------------------- the shipped configs

CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


def two_steps(name: str) -> tuple[str, int, float, int]:
    """Mode, ZeRO stage, density and applied steps of an engine made from a shipped config as it is."""
    config = json.loads((ROOT / "ds_configs" / name).read_text())
    model = build("gpt2")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    child = ds_childtune.attach(engine)
    mine = deal(batches("gpt2", 4), dist.get_rank(), dist.get_world_size())
    if child.config.mode == "ChildTuning-D":
        child.select(mine)
    for batch in mine:
        train_step(engine, [batch])
    answer = child.config.mode, engine.zero_optimization_stage(), child.report().density, child.step
    child.detach()
    engine.destroy()
    return answer


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_train(pool: RankPool, name: str) -> None:
    for mode, stage, density, step in pool[2].run(two_steps, name):
        assert name.startswith(f"zero{stage}_")
        assert name.endswith(f"child_{mode[-1].lower()}.json")
        assert density == pytest.approx(0.3, abs=0.06)  # of 1,700 elements, drawn at random in one of the modes
        assert step == 2


def test_a_sigterm_to_the_launcher_leaves_no_orphan(folder: Path, tmp_path: Path) -> None:
    arguments = job(folder, tmp_path / "results.jsonl", "--epochs", "100000", "--max-steps", "1000000")
    command = [*deepspeed_launcher(2), "launch/finetune.py", *arguments]
    with started(command, environment(folder)) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("kept" in line for line in lines), "it never came to train"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3, "vacuous: expected the process that keeps the ranks, and two ranks"
        process.terminate()
        process.communicate(timeout=60)  # until every one of them has closed its end of the pipe
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive

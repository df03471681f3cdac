"""The main job, and its recipes as people start them: two nodes, OpenMPI, no compiler, a launcher that is ended.

Two ranks train on the same batches however they were started, so every start must end with the numbers of a run in ranks that were
there already. Two "nodes" are two launchers on loopback.
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
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist
import transformers

import ds_childtune
from tests.support import finetune_jobs
from tests.support.engines import train_step
from tests.support.finetune_jobs import ROOT, command_line, make_inputs, options
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

BIN = Path(sys.executable).parent
SECONDS = 240.0
"""A run that is not done by then hangs; with two busy cores each takes about twenty seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    make_inputs(folder)
    return folder


def job(folder: Path, results: Path, **more: Any) -> list[str]:
    """Arguments of launch/finetune.py."""
    return command_line(options(folder, results=results, **more))


def environment(folder: Path, **changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **caches, **changes}


@contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in its own session, so that what it leaves behind can be ended with it."""
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()  # a test that fails leaves nothing that the next one would be blamed for


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


def without_compiler(folder: Path) -> dict[str, str]:
    """Of a machine that has none."""
    tools = folder / "bin"
    if not tools.exists():
        tools.mkdir()
        for tool in ("bash", "dirname", "env", "hostname", "python3", "uname"):
            found = shutil.which(tool)
            if found:
                (tools / tool).symlink_to(found)
    path = os.pathsep.join([str(BIN), str(tools)])
    assert shutil.which("g++", path=path) is None
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    return {"PATH": path, "CXX": "/no/compiler", "CC": "/no/compiler", **caches}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def only_result(path: Path) -> dict[str, Any]:
    lines = lines_of(path)
    assert len(lines) == 1, "expected one line, written by rank 0"
    return lines[0]


def in_process(pool: RankPool, folder: Path, ranks: int = 2, **more: Any) -> dict[str, Any]:
    """The result of a run without a launcher."""
    ended = pool[ranks].run(finetune_jobs.run, folder, options(folder, **more))
    assert [end.error for end in ended] == [""] * ranks
    return ended[0].result


def same_training(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("train_loss", "metrics", "density", "steps", "world_size"))


@pytest.fixture(scope="module")
def expected(pool: RankPool, folder: Path) -> dict[str, Any]:
    """ChildTuning-D on two ranks, which no launcher has started; its checkpoint, tuned model and exported child are in `folder`."""
    made = {"output": folder / "tuned", "export": folder / "child", "checkpoints": folder / "checkpoints"}
    return in_process(pool, folder, save_every=3, results=folder / "expected.jsonl", **made)


# ---------------------------------------------------------------- what the job does, without a launcher


def test_the_result_is_written(expected: dict[str, Any], folder: Path) -> None:
    assert only_result(folder / "expected.jsonl") == json.loads(json.dumps(expected))
    assert expected["world_size"] == 2
    assert expected["method"] == "ChildTuning-D"
    assert expected["density"] == pytest.approx(expected["ds_config"]["child_tuning"]["reserve_p"], abs=1e-3)
    assert expected["seconds"]["fisher"] > 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tuned")
    assert model.num_labels == 2


def test_the_same_command_goes_on_from_the_last_checkpoint(
    pool: RankPool, expected: dict[str, Any], folder: Path
) -> None:
    """Which is of step 3 of 4: the last step, again, ends where the first run did."""
    resumed = in_process(pool, folder, save_every=3, checkpoints=folder / "checkpoints")
    assert same_training(resumed, expected)
    assert expected["seconds"]["fisher"] > resumed["seconds"]["fisher"] == 0, "vacuous: the child was chosen again"


def test_the_exported_child_makes_the_tuned_model(expected: dict[str, Any], folder: Path) -> None:
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tuned")
    applied = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    ds_childtune.apply_child(applied, folder / "child")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, applied.state_dict()[name]), name


def test_regression_and_language_modelling(pool: RankPool, folder: Path) -> None:
    regression = in_process(pool, folder, ranks=1, task="regression", method="plain", group_by_length=True)
    assert set(regression["metrics"]) == {"pearson", "spearman", "mse"}
    language = {"task": "causal-lm", "model": f"{folder}/gpt2", "text_columns": "text"}
    perplexity = in_process(pool, folder, **language)["metrics"]["perplexity"]
    assert 1 < perplexity < 14, "expected less than the vocabulary's size"


LANGUAGE = {"task": "causal-lm", "text_columns": "text"}


def write_answers(folder: Path) -> Path:
    rows = [{"prompt": "good film was the " * (1 + i % 3), "text": "bad a book " * (1 + i % 2)} for i in range(5)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "answers.jsonl"


def of_answers(folder: Path, model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [tokens, vocabulary] at the answers' tokens, and those tokens, one row at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2")
    of = transformers.AutoModelForCausalLM.from_pretrained(folder / model).eval()
    found = []
    for row in lines_of(folder / "answers.jsonl"):
        prompt, text = (tokenizer(row[key])["input_ids"] for key in ("prompt", "text"))
        with torch.no_grad():
            log_p = of(torch.tensor([[*prompt, *text][:16]])).logits.log_softmax(-1)[0]
        found += [(log_p[i - 1], ids) for i, ids in enumerate([*prompt, *text][:16]) if i >= len(prompt)]
    return torch.stack([log_p for log_p, _ in found]), torch.tensor([ids for _, ids in found])


def test_a_curve_with_general_text_and_answers(pool: RankPool, folder: Path) -> None:
    """ZeRO-3 on two ranks. Evaluation between steps does not change training; NLL and KL are those of a plain model, row by row."""
    lm = LANGUAGE | {"model": f"{folder}/gpt2", "selector": "contrast", "against_file": folder / "eval.jsonl"}
    plain = in_process(pool, folder, **lm, max_steps=3)
    also = {"also_eval": [f"answers={write_answers(folder)}"], "kl": "answers"}
    curve = {"eval_every": 2, "eval_first": True, "eval_batch_size": 2}
    looked = in_process(pool, folder, **lm, **also, **curve, max_steps=3, output=folder / "tuned-gpt2")
    assert looked["train_loss"] == plain["train_loss"]
    assert plain["curve"] is None
    points = looked["curve"]
    assert [point["step"] for point in points] == [0, 2, 3]
    assert points[-1]["metrics"] == looked["metrics"]
    assert points[-1]["also"] == looked["also"]
    assert points[0]["also"]["answers"]["kl"] == 0
    before, tokens = of_answers(folder, "gpt2")
    after, _ = of_answers(folder, "tuned-gpt2")
    for point, log_p in ((points[0], before), (points[-1], after)):
        nll = -log_p.gather(1, tokens[:, None]).mean()
        assert point["also"]["answers"]["loss"] == pytest.approx(float(nll), rel=1e-4)
    kl = float((before.exp() * (before - after)).sum(1).mean())
    assert kl > 1e-4, "vacuous: nothing was learnt"
    assert points[-1]["also"]["answers"]["kl"] == pytest.approx(kl, rel=1e-2)


def test_adapters_train_in_place_of_weights(pool: RankPool, folder: Path) -> None:
    pytest.importorskip("peft")
    lm = LANGUAGE | {"model": f"{folder}/gpt2", "method": "plain", "lora_rank": 2}
    few = in_process(pool, folder, ranks=1, **lm, peft="lora")
    all_ = in_process(pool, folder, ranks=1, **lm)
    # Of each of two blocks: rank 2 times inputs plus outputs of its four linear maps.
    assert few["trainable"] == 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    assert all_["trainable"] > few["trainable"]
    assert few["optimizer_bytes"] == 12 * few["trainable"]
    assert all_["optimizer_bytes"] == 12 * all_["trainable"]
    assert few["metrics"] != all_["metrics"]
    (end,) = pool[1].run(finetune_jobs.run, folder, options(folder, **lm, peft="dora"))
    remedy = end.error.partition("Remedy: --ds-config ")[2].rstrip(".")
    dora = in_process(pool, folder, ranks=1, **lm, peft="dora", ds_config=ROOT / remedy)
    # A magnitude for each output more.
    assert dora["trainable"] == few["trainable"] + 2 * (48 + 16 + 64 + 16)


@pytest.mark.parametrize(("config", "resumed"), [("zero3_child_d", (1,)), ("zero3_compact_child_d", (2, 4))])
def test_a_child_of_adapters(pool: RankPool, folder: Path, config: str, resumed: tuple[int, ...]) -> None:
    """Chosen after two steps, which train all adapters: then only the child moves. Interrupted before and after it is chosen."""
    pytest.importorskip("peft")
    checkpoints, still = folder / f"{config}-adapters", folder / "gpt2-still"
    shutil.copytree(folder / "gpt2", still, dirs_exist_ok=True)
    # Without dropout, as a checkpoint of before the child is plain DeepSpeed's, without random states.
    shape = json.loads((still / "config.json").read_text()) | {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    (still / "config.json").write_text(json.dumps(shape))
    lora = {"peft": "lora", "lora_rank": 2, "select_at": 2, "ds_config": ROOT / f"ds_configs/{config}.json"}
    child = {"method": "ChildTuning-D", "reserve_p": 0.2, "max_steps": 5, "checkpoints": checkpoints, "save_every": 1}
    given = options(folder, **LANGUAGE, model=str(still), **lora, **child)
    ended, weights = pool[2].run(finetune_jobs.run_watched, folder, given)[0]
    assert ended.error == ""
    assert ended.result["density"] == pytest.approx(0.2, abs=0.01)
    assert ended.result["seconds"]["fisher"] > 0
    moved = [{n: old[n] != new[n] for n in old} for old, new in pairwise(weights)]
    assert all(mask.all() for name, mask in moved[0].items() if "lora_B" in name), (
        "before the child is chosen all adapters train"
    )
    inside = {n: a | b for (n, a), b in zip(moved[1].items(), moved[2].values(), strict=True)}
    assert sum(int(m.sum()) for m in inside.values()) == round(0.2 * ended.result["trainable"])
    assert any(mask.any() for name, mask in inside.items() if "lora_A" in name), "A has scores by now"
    for step in resumed:
        (checkpoints / "latest").write_text(f"global_step{step}")
        assert same_training(in_process(pool, folder, **given), ended.result), step


def test_bytes_of_a_compact_child(pool: RankPool, folder: Path) -> None:
    """As the second study measures them: masters and two moments for the child's elements only."""
    lm = LANGUAGE | {"model": f"{folder}/gpt2", "ds_config": ROOT / "launch" / "study" / "lm_zero2.json"}
    child = in_process(pool, folder, ranks=1, **lm)
    assert child["optimizer_bytes"] == 12 * round(child["density"] * child["trainable"])
    assert child["density"] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"selector": "contrast"}, "--selector contrast and --against-file together"),
        ({"select_at": 2, "method": "plain"}, "--select-at: expected --method ChildTuning-D"),
        ({"selector": "random", "method": "ChildTuning-F"}, "--selector: expected --method ChildTuning-D"),
        ({"fisher_max_batches": 2, "method": "ChildTuning-F"}, "--fisher-max-batches: expected --method ChildTuning-D"),
        ({"select_at": 4, "max_steps": 4}, "--select-at: expected fewer than the run's 4 steps"),
        ({"select_at": 2, "export": Path("child")}, "Remedy: --output"),
        ({"task": "causal-lm", "kl": "answers"}, "a name among --also-eval"),
    ],
)
def test_options_that_need_another(pool: RankPool, folder: Path, given: dict[str, Any], says: str) -> None:
    (end,) = pool[1].run(finetune_jobs.run, folder, options(folder, **given))
    assert says in end.error


def test_a_wrong_file_is_one_readable_error(pool: RankPool, folder: Path) -> None:
    """On every rank, so that no rank waits for another."""
    for end in pool[2].run(finetune_jobs.run, folder, options(folder, eval_file=folder / "missing.jsonl")):
        assert "missing.jsonl, which is not there" in end.error


# ---------------------------------------------------------------- how it is started


def test_side_by_side_on_two_nodes_without_ssh_and_compiler(pool: RankPool, folder: Path) -> None:
    """launch/node_by_node.sh. --compare trains plain and then the child, whose masks come from the eager kernel."""
    hostfile = folder / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    results = folder / "two_nodes.jsonl"
    address = {"HOSTFILE": str(hostfile), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    address |= without_compiler(folder)
    child = {"method": "ChildTuning-F", "reserve_p": 0.5}
    command = ["bash", "launch/node_by_node.sh", *job(folder, results, compare=True, **child)]
    with (
        started(command, environment(folder, NODE_RANK="0", **address)) as first,
        started(command, environment(folder, NODE_RANK="1", **address)) as second,
    ):
        output_of(second)
        output = output_of(first)
    plain, tuned = lines_of(results)
    assert (plain["method"], tuned["method"]) == ("plain", "ChildTuning-F")
    assert same_training(tuned, in_process(pool, folder, **child))
    assert same_training(plain, in_process(pool, folder, method="plain"))
    assert plain["train_loss"] != tuned["train_loss"], "vacuous: the mask made no difference"
    assert "eager kernel" in output
    assert "accuracy" in output
    assert "density" in output
    assert output.count("are eligible (") == 1, "attach reports only on rank 0, whatever DeepSpeed's log level"


def test_openmpi(expected: dict[str, Any], folder: Path) -> None:
    """launch/mpirun.sh: ranks from OpenMPI, found by DeepSpeed through mpi4py."""
    results = folder / "mpi.jsonl"
    mpi = ["--allow-run-as-root", "--oversubscribe", "-np", "2"]
    command = ["bash", "launch/mpirun.sh", *mpi, "--", *job(folder, results)]
    with started(command, environment(folder, MASTER_PORT=str(free_port()))) as process:
        output_of(process)
    assert same_training(only_result(results), expected)


WAITING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "launch")!r})
from processes import processes
with processes():
    os.write(1, b"up\\n")  # at once, so that the other rank's does not come between
    signal.pause()
"""


def test_a_sigterm_to_the_launcher_leaves_no_orphan(folder: Path) -> None:
    """Of two ranks on one node, in the process group of the main job."""
    (folder / "waiting.py").write_text(WAITING)
    command = [*deepspeed_launcher(2), str(folder / "waiting.py")]
    with started(command, environment(folder)) as process:
        assert process.stdout is not None
        up = (line for line in iter(process.stdout.readline, "") if line.strip() == "up")
        assert len(list(islice(up, 2))) == 2, "the ranks never came up"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3, "vacuous: expected the process that keeps the ranks, and two ranks"
        process.terminate()
        process.communicate(timeout=SECONDS)  # until every one of them has closed its end of the pipe
        _, alive = psutil.wait_procs(family, timeout=SECONDS)
        assert not alive


# ---------------------------------------------------------------- the shipped configs

CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json") if "_auto_" not in path.name)
"""Those with "auto" are for a Trainer, see tests/test_callback.py."""


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

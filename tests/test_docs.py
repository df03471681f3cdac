"""README and docs do what they say: every code block runs, every link leads somewhere, every quoted message is one of ours."""

from __future__ import annotations

import ast
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import ds_childtune
from ds_childtune.config import parse_config
from tests.support.documentation import (
    FENCE,
    PAGES,
    ROOT,
    Block,
    blocks,
    code_of,
    commands,
    error_of,
    prepare,
    run_code,
    run_command_line,
)
from tests.support.ranks import RankPool
from tests.support.study_jobs import study
from tests.versions import SETS

sys.path.insert(0, str(ROOT / "launch"))
from arguments import Arguments, command

ALL = blocks()
PYTHON = [block for block in ALL if block.language in ("python", "diff")]
JSON = [block for block in ALL if block.language == "json"]
COMMANDS = [(block, words) for block in ALL if block.language == "bash" for words in commands(block)]
COMMAND_LINES = [block for block in ALL if block.language == "bash" and "ds_childtune " in block.text]


@pytest.fixture(scope="module")
def folder(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model, children and a checkpoint."""
    folder = tmp_path_factory.mktemp("docs") / "prepared"
    folder.mkdir()
    pool[1].run(prepare, str(folder))
    return str(folder)


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in ALL} == {"python", "diff", "json", "bash", "text"}
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        assert "```" not in text, f"{page}: a fence that is not closed"
        assert not re.search(r"\n\n {4}\S", text), f"{page}: a block without a fence"


# ---------------------------------------------------------------- Python and json


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(pool: RankPool, folder: str, block: Block) -> None:
    """With a checkpoint and without one, where that makes a difference."""
    code = code_of(block)
    for with_checkpoint in (False, True) if "load_checkpoint(" in code else (False,):
        [found] = pool[1].run(run_code, code, folder, with_checkpoint=with_checkpoint)
    if block.language == "diff" and "engine.step()" in code:
        assert found["steps"] == 3, "the loop trains"
    if "merge(" in code:
        assert {"rte-model/config.json", "both/child.json"} <= set(found["files"])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("child.select([])", "ValueError"),
        ("unknown_name", "unknown_name"),
        ("ds_childtune.merge('bert-base', ['tasks/none'], 'out')", "tasks/none"),
    ],
)
def test_a_block_that_fails_is_noticed(pool: RankPool, folder: str, code: str, says: str) -> None:
    [said] = pool[1].run(error_of, code, folder)
    assert said is not None
    assert says in said


@pytest.mark.parametrize("block", JSON, ids=str)
def test_json_is_a_config(block: Block) -> None:
    parse_config(json.loads(block.text)["child_tuning"])


# ---------------------------------------------------------------- commands


def options_of(script: Path) -> set[str]:
    """Of a script with argparse, by its text."""
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))


def parse_finetune(words: list[str]) -> Arguments:
    app, seen = typer.Typer(), []
    app.command()(command(seen.append, None))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return seen[0]


def parse_study(words: list[str]) -> None:
    app = typer.Typer()
    app.command()(study.run)
    for view in (study.report, study.forgetting, study.learning, study.spread, study.together, study.tuning):
        app.command()(view)
    group: Any = get_command(app)
    name, sub, rest = group.resolve_command(group.make_context("study", [], resilient_parsing=True), words)
    try:
        sub.make_context(name, rest)
    except Exception as error:  # of the click inside typer
        raise AssertionError(str(error)) from error


def check_script(script: str, words: list[str]) -> None:
    """Whether a script of ours takes these arguments."""
    path = ROOT / script
    assert path.is_file(), script
    if script == "launch/mpirun.sh":
        parse_finetune(words[words.index("--") + 1 :])
    elif script == "launch/study/study.py":
        parse_study(words)
    elif script in ("launch/study/evidence_2.sh", "launch/study/prepare_lm.py"):
        assert len(words) == 2, words
    elif script.startswith("launch/"):
        parse_finetune(words)
    elif script == "tests/versions.py":
        assert set(words) <= set(SETS), words
    elif script.startswith("tests/benchmarks/"):
        assert {word for word in words if word.startswith("--")} <= options_of(path), words
    else:
        assert script == "tests/run.sh", f"{script}: no test knows its arguments"


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "pip":
        assert rest[0] == "install"
        check_requirement(rest[1])
    elif program == "deepspeed":
        while rest[0] in ("--num_gpus", "--num_nodes"):
            rest = rest[2:]
        check_script(rest[0], rest[1:])
    elif program == "python" and rest[0] == "-m":
        check_script(rest[1].replace(".", "/") + ".py", rest[2:])
    elif program in ("bash", "sbatch", "python"):
        check_script(rest[0], rest[1:])
    else:
        assert program == "ds_childtune", f"{program}: no test knows this command"  # which test_command_line runs


def check_requirement(text: str) -> None:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", table, re.MULTILINE)
    match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", text)
    assert match, text
    assert set((match[1] or "").split(",")) - {""} <= set(extras), text


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else str(x)
)
def test_commands_are_right(block: Block, words: list[str]) -> None:
    check_command(words)
    for word in words:
        if re.match(r"(launch|tests|ds_configs|docs)/", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize(
    "words",
    [
        "deepspeed launch/finetune.py --reserve-q 0.3",
        "deepspeed launch/finetune.py --method ChildTuning-X",
        "python launch/study/study.py run --dat x",
        "python -m tests.benchmarks.compact --sizes 22m",
        "bash launch/none.sh",
        "pip install .[none]",
        "make all",
    ],
)
def test_a_wrong_command_is_noticed(words: str) -> None:
    with pytest.raises(AssertionError):
        check_command(words.split())


@pytest.mark.parametrize("block", COMMAND_LINES, ids=str)
def test_command_line(pool: RankPool, folder: str, block: Block) -> None:
    lines = [words[1:] for words in commands(block) if words[0] == "ds_childtune"]
    [outputs] = pool[1].run(run_command_line, lines, folder)
    assert len(outputs) == len(lines) > 0
    assert all(outputs)


# ---------------------------------------------------------------- links and messages


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_index() -> None:
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        for page in (ROOT / "docs").glob("*.md"):
            assert page.name == "README.md" or f"{page.name})" in index.read_text(), f"{index}: {page.name}"


@cache
def messages() -> str:
    """Every string of the package, what is filled in as a line break."""
    texts = []
    for path in Path(ds_childtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\n" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


def test_quoted_messages_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 25, "vacuous: the table was not found"
    for message in quoted:
        assert message in messages(), message

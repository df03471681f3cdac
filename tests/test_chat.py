"""Instruction tuning in the main job: which tokens are labels, packing, and whole runs."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ds_childtune
from tests.support import finetune_jobs
from tests.support.finetune_jobs import ROOT, WORDS
from tests.support.ranks import RankPool

sys.path.insert(0, str(ROOT / "launch"))
from chat_data import chat_rows, conversation, packed

SPECIAL = ["[PAD]", "[UNK]", "<start>", "<end>", "user", "assistant", "system", "polite"]
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<start> system polite <end> {% endif %}"
    "<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<start> {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end>"
    "{% endgeneration %}{% else %}{{ m['content'] }} <end>{% endif %} {% endfor %}"
)
FORGETFUL = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else 'was' }}")
"""Writes an answer in another way once a message follows, as templates do that drop a model's thoughts."""


def tokenizer(template: str | None = TEMPLATE) -> Any:
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="<end>", model_max_length=64
    )
    fast.chat_template = template
    return fast


def says(*turns: str) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn; "role: text" says the role."""
    made = []
    for i, turn in enumerate(turns):
        role, _, text = turn.rpartition(": ")
        made.append({"role": role or ("user", "assistant")[i % 2], "content": text})
    return made


def learnt(rows: dict[str, list[Any]], of: Any) -> list[str]:
    """For each row, the words that are labels."""
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return [of.decode([t for t in labels if t != -100]) for labels in rows["labels"]]


# ---------------------------------------------------------------- which tokens are labels


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
def test_only_answers_are_labels(template: str) -> None:
    of = tokenizer(template)
    talk = says("the film", "good book", "a song", "poor")
    rows = chat_rows(of, {"messages": [talk, says("system: polite", "user: was the", "assistant: bad")]}, 64)
    assert learnt(rows, of) == ["good book <end> poor <end>", "bad <end>"]
    whole = of.decode(rows["input_ids"][0])
    assert whole.split() == of.apply_chat_template(talk, tokenize=False).split()


def test_a_completion_is_the_answer_and_nothing_before_it() -> None:
    of = tokenizer()
    texts = chat_rows(of, {"prompt": ["the film was"], "completion": ["good film"]}, 64)
    assert learnt(texts, of) == ["good film <end>"]
    assert of.decode(texts["input_ids"][0]).startswith("<start> system polite <end> <start> user the film was <end>")
    lists = {"prompt": [says("the film", "good", "a book")], "completion": [[{"role": "assistant", "content": "poor"}]]}
    assert learnt(chat_rows(of, lists, 64), of) == ["poor <end>"]
    bare = tokenizer(None)
    without = chat_rows(bare, {"prompt": ["the film was"], "completion": ["good"]}, 64)
    assert bare.decode(without["input_ids"][0]) == "the film was good <end>"
    assert learnt(without, bare) == ["good <end>"]


def test_examples_are_cut_and_those_without_an_answer_are_left_out() -> None:
    of = tokenizer()
    long = says("the film " * 20, "good")
    rows = chat_rows(of, {"messages": [long, says("the film", "good book was the song")]}, 14)
    assert learnt(rows, of) == ["good book was"]
    assert [len(ids) for ids in rows["input_ids"]] == [14]


def test_keys_that_only_other_messages_have_are_nothing() -> None:
    """And a conversation may begin with an answer."""
    of = tokenizer(TEMPLATE.replace("{{ m['content'] }}", "{{ 'poor' if 'tool' in m else m['content'] }}"))
    talks = [[{"role": "assistant", "content": "good", "tool": tool}] for tool in (None, "a")]
    assert learnt(chat_rows(of, {"messages": talks}, 64), of) == ["good <end>", "poor <end>"]


def test_templates_that_cannot_be_used_and_the_remedies() -> None:
    talk = says("the film", "good", "a book", "poor")
    with pytest.raises(ValueError, match="Remedy: take the model's instruct version, or give a template"):
        chat_rows(tokenizer(None), {"messages": [talk]}, 64)
    with pytest.raises(ValueError, match=r"message 1 .* mark the answers in it with {% generation %}"):
        chat_rows(tokenizer(FORGETFUL), {"messages": [talk]}, 64)
    of = tokenizer(FORGETFUL)
    rows = chat_rows(of, {"prompt": [talk[:3]], "completion": [talk[3:]]}, 64)  # the second remedy
    assert learnt(rows, of) == ["poor <end>"]


# ---------------------------------------------------------------- packing


def test_packing_keeps_examples_whole() -> None:
    of = tokenizer()
    rows = chat_rows(of, {"messages": [says("the film", "good " * (1 + i % 3)) for i in range(7)]}, 64)
    made = packed(rows, 32, of.pad_token_id)
    assert {len(ids) for ids in made["input_ids"]} == {32}
    assert len(made["input_ids"]) < 7
    found = []
    for ids, positions, labels in zip(made["input_ids"], made["position_ids"], made["labels"], strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], 32], strict=True):
            assert positions[start:end] == list(range(end - start))
            if any(label != -100 for label in labels[start:end]):
                found.append((ids[start:end], labels[start:end]))
            else:
                assert set(ids[start:end]) == {of.pad_token_id}
    assert found == list(zip(rows["input_ids"], rows["labels"], strict=True))


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_do_not_see_each_other(attention: str) -> None:
    """Loss and gradients are those of one example after the other."""
    of, model = tokenizer(), llama()
    model.config.use_cache = False
    model.set_attn_implementation(attention)
    rows = chat_rows(of, {"messages": [says("the film", "good " * (1 + i)) for i in range(3)]}, 64)
    made = {key: torch.tensor(value) for key, value in packed(rows, 64, of.pad_token_id).items()}
    assert len(made["input_ids"]) == 1
    (packed_loss,) = gradients(model, [made])
    alone = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        alone.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    weights = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    each = gradients(model, alone)
    for name in packed_loss:
        mean = sum(w * g[name] for w, g in zip(weights, each, strict=True)) / sum(weights)
        assert torch.allclose(packed_loss[name], mean, atol=1e-6), name
    del made["position_ids"]
    (seen,) = gradients(model, [made])
    assert not torch.allclose(seen["loss"], packed_loss["loss"], atol=1e-4), "vacuous: positions do not matter"


def gradients(model: Any, batches: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": loss.detach()})
    return found


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    llama().save_pretrained(folder / "llama")
    tokenizer(None).save_pretrained(folder / "llama")
    (folder / "template.jinja").write_text(TEMPLATE)
    for name, count in (("train", 24), ("eval", 6)):
        talks = [
            {"messages": says(f"the {WORDS[4 + i % 3]}", f"{WORDS[i % 4]} {WORDS[4 + i % 3]}")} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, talks)))
        pairs = [{"prompt": t["messages"][0]["content"], "completion": t["messages"][1]["content"]} for t in talks]
        (folder / f"pairs-{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def job(pool: RankPool, folder: Path, ranks: int = 2, **more: Any) -> dict[str, Any]:
    files = {"train_file": folder / "train.jsonl", "eval_file": folder / "eval.jsonl"}
    given = {"model": f"{folder}/llama", "task": "causal-lm", "chat_template": folder / "template.jinja", **files}
    given |= {"batch_size": 2, "max_steps": 6, "lr": 0.02, "max_length": 32, **more}
    ended = pool[ranks].run(finetune_jobs.run, folder, given)
    assert [end.error for end in ended] == [""] * ranks
    return ended[0].result


COMPACT = ROOT / "ds_configs" / "zero3_compact_child_d.json"


def test_a_chat_model_of_a_compact_child(pool: RankPool, folder: Path) -> None:
    """ZeRO-3, bf16, packed, with activation checkpointing: it learns, is saved in safetensors, and base + child equals it."""
    made = {"output": folder / "tuned", "export": folder / "child"}
    few = {"precision": "bf16", "ds_config": COMPACT, "packing": True, "gradient_checkpointing": True}
    before = job(pool, folder, max_steps=1, lr=1e-9, **few)["metrics"]
    after = job(pool, folder, **few, **made)
    assert after["metrics"]["perplexity"] < 0.8 * before["perplexity"]
    assert after["train_examples"] < 24, "vacuous: nothing was packed"
    assert sorted(p.name for p in (folder / "tuned").iterdir() if "model" in p.name) == ["model.safetensors"]
    tuned = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.bfloat16)
    assert tuned.config.use_cache
    assert transformers.AutoTokenizer.from_pretrained(folder / "tuned").chat_template == TEMPLATE
    applied = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    ds_childtune.apply_child(applied, folder / "child")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, applied.state_dict()[name]), name


def test_packed_training_sees_the_same_examples(pool: RankPool, folder: Path) -> None:
    """One step over all rows: its loss is the mean over the answers' tokens, one example at a time."""
    rows = job(pool, folder, ranks=1, method="plain", packing=True, max_steps=1)["train_examples"]
    packed_loss = job(pool, folder, ranks=1, method="plain", packing=True, max_steps=1, batch_size=rows)["train_loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert packed_loss == pytest.approx(loss_of(model, folder / "train.jsonl"), rel=1e-5)


def loss_of(model: Any, path: Path) -> float:
    """Mean over the answers' tokens of all rows, one example at a time."""
    total = tokens = 0.0
    for line in path.read_text().splitlines():
        one = conversation(tokenizer(), json.loads(line)["messages"], answers_from=0)
        count = sum(label != -100 for label in one.labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([one.ids]), labels=torch.tensor([one.labels])).loss
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


def test_checkpointing_and_the_kind_of_row_change_nothing(pool: RankPool, folder: Path) -> None:
    plain = job(pool, folder, method="plain")
    assert job(pool, folder, method="plain", gradient_checkpointing=True)["train_loss"] == plain["train_loss"]
    pairs = {"train_file": folder / "pairs-train.jsonl", "eval_file": folder / "pairs-eval.jsonl"}
    assert job(pool, folder, method="plain", **pairs)["train_loss"] == plain["train_loss"]


def test_adapters_are_saved_as_peft_loads_them(pool: RankPool, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    few = {"method": "plain", "peft": "lora", "lora_rank": 2, "gradient_checkpointing": True}
    ended = job(pool, folder, **few, output=folder / "adapters")
    assert (folder / "adapters" / "adapter_model.safetensors").exists()
    assert not list((folder / "adapters").glob("*.bin"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers 6, about what peft reads
        model = peft.PeftModel.from_pretrained(base, folder / "adapters")
    assert loss_of(model, folder / "eval.jsonl") == pytest.approx(ended["metrics"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "says_"),
    [
        ({"task": "classification", "packing": True}, "--packing: expected --task causal-lm"),
        ({"chat_template": None}, "Remedy: take the model's instruct version, or give a template with --chat-template"),
        ({"max_length": 4}, "an answer that begins in them"),
    ],
)
def test_options_that_do_not_fit(pool: RankPool, folder: Path, given: dict[str, Any], says_: str) -> None:
    files = {"train_file": folder / "train.jsonl", "eval_file": folder / "eval.jsonl"}
    options = {"model": f"{folder}/llama", "task": "causal-lm", "chat_template": folder / "template.jinja", **files}
    (end,) = pool[1].run(finetune_jobs.run, folder, {**options, **given})
    assert says_ in end.error

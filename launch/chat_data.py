"""Chat data of launch/finetune.py: conversations in the tokenizer's template, of which only the answers are labels.

A row is a conversation, as its columns say:

    messages               a list of {"role": ..., "content": ...}; what the assistant says is an answer
    prompt, completion     two texts, or two such lists; the completion is the answer

Two texts become a user's and an assistant's message, or, where the tokenizer has no template, one text after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Tokens:
    """One example."""

    ids: list[int]
    labels: list[int]
    """-100 where nothing is learnt. Never of the first token, which nothing predicts."""

    def cut(self, length: int) -> Tokens:
        return Tokens(self.ids[:length], self.labels[:length])


def is_chat(columns: Sequence[str]) -> bool:
    return "messages" in columns or {"prompt", "completion"} <= set(columns)


def chat_rows(tokenizer: Any, rows: Columns, length: int) -> Columns:
    """Tokenised examples, cut at `length` tokens; those whose answers are all cut off are left out.

    Raises:
        ValueError: for messages without a template, or a template whose answers cannot be found.
    """
    examples = [example(tokenizer, rows, i).cut(length) for i in range(len(next(iter(rows.values()))))]
    kept = [one for one in examples if any(label != -100 for label in one.labels)]
    return {
        "input_ids": [one.ids for one in kept],
        "attention_mask": [[1] * len(one.ids) for one in kept],
        "labels": [one.labels for one in kept],
    }


def packed(rows: Columns, length: int, pad: int) -> Columns:
    """Examples one after the other, as many as fit into a row of `length` tokens; what is left of a row is one more, of padding.

    Positions begin at 0 for each. By that transformers' attention keeps examples apart, where there is neither an attention mask nor
    a cache.
    """
    made: Columns = {"input_ids": [], "position_ids": [], "labels": []}
    for members in _fitting(rows, length):
        left = length - sum(len(m.ids) for m in members)
        members = [*members, Tokens([pad] * left, [-100] * left)]
        made["input_ids"].append([t for m in members for t in m.ids])
        made["position_ids"].append([i for m in members for i in range(len(m.ids))])
        made["labels"].append([t for m in members for t in m.labels])
    return made


def _fitting(rows: Columns, length: int) -> Iterator[list[Tokens]]:
    row: list[Tokens] = []
    for one in map(Tokens, rows["input_ids"], rows["labels"]):
        if row and sum(len(m.ids) for m in row) + len(one.ids) > length:
            yield row
            row = []
        row.append(one)
    if row:
        yield row


def example(tokenizer: Any, rows: Columns, number: int) -> Tokens:
    """One row's conversation."""
    if "messages" in rows:
        return conversation(tokenizer, _clean(rows["messages"][number]), answers_from=0)
    prompt, completion = rows["prompt"][number], rows["completion"][number]
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        head = tokenizer(prompt)["input_ids"]
        if head and head[-1] == tokenizer.eos_token_id:
            head = head[:-1]  # some tokenizers end every text
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return _labelled([*head, *tail], [False] * len(head) + [True] * len(tail))
    if isinstance(prompt, str):
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    prompt, completion = _clean(prompt), _clean(completion)
    return conversation(tokenizer, [*prompt, *completion], answers_from=len(prompt))


def conversation(tokenizer: Any, messages: list[Message], *, answers_from: int) -> Tokens:
    """Messages in the template; the assistant's, from number `answers_from` on, are labels, their ends included."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "expected a tokenizer with a chat template for chat data, got one without. Remedy: take the model's instruct version, or"
            " give a template with --chat-template."
        )
    if "generation %}" in str(tokenizer.chat_template).replace("-%}", " %}") and answers_from == 0:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return _labelled(found["input_ids"], [bool(m) for m in found["assistant_masks"]])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = list(_answer_spans(tokenizer, messages, whole, answers_from))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(start <= first < end for start, end in spans) for first, _ in found["offset_mapping"]]
    return _labelled(found["input_ids"], inside)


def _answer_spans(tokenizer: Any, messages: list[Message], whole: str, answers_from: int) -> Iterator[tuple[int, int]]:
    """Where answers are in the rendered text: what the template adds to the prompt that it would make for each of them."""
    for i, message in enumerate(messages):
        if i < answers_from or message["role"] != "assistant":
            continue
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        before = _prompt(tokenizer, messages[:i], after)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"expected a chat template that writes message {i} in the same way whatever follows, got another text. Remedy:"
                " mark the answers in it with {% generation %}, with --chat-template, or make a row of prompt and completion of each"
                " answer."
            )
        yield len(before), len(after)


def _prompt(tokenizer: Any, messages: list[Message], after: str) -> str:
    """The text before the next answer, of which `after` is the text with the answer."""
    if messages:
        prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt
    # transformers renders no empty conversation: a prompt for an answer is what it adds to any other.
    any_ = [{"role": "user", "content": "a"}]
    bare = tokenizer.apply_chat_template(any_, tokenize=False)
    added = tokenizer.apply_chat_template(any_, tokenize=False, add_generation_prompt=True)[len(bare) :]
    return after[: after.find(added) + len(added)]


def _labelled(ids: list[int], answers: list[bool]) -> Tokens:
    labels = [token if inside else -100 for token, inside in zip(ids, answers, strict=True)]
    return Tokens(ids, [-100, *labels[1:]])


def _clean(messages: list[Message]) -> list[Message]:
    """Without the keys that other rows have and that this one lacks: datasets fills them up with None."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]

"""Owns conversations: rows of chat data in any of the usual forms -> tokens, and which of them the assistant wrote.

A conversation becomes text by the chat template of the model's tokenizer, and by nothing else.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.runtime.errors import UserError

# as ShareGPT and others name those who speak
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **{role: role for role in ("system", "developer")},
}
SPEAKER, SAID = ("role", "from"), ("content", "value")
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")  # in a template: here the assistant's text begins


def is_conversation(value: Any) -> bool:
    """A list of turns, or a turn's parts each as a list, as `datasets` gives a sequence of structs."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(part, list) for part in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def is_chat(columns: Iterable[str]) -> bool:
    """Whether rows with these columns, as `sources.documents` gives them, are conversations."""
    return not {"text", "input_ids"} & set(columns)


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row with `messages`, or with `prompt` and `response`, as {"role", "content", ...}.

    `UserError` where a turn has no speaker that is known, or holds more than text.
    """
    if "messages" in row:
        turns = row["messages"]
        if isinstance(turns, dict):
            turns = [dict(zip(turns, parts)) for parts in zip(*turns.values())]
    else:
        turns = []
        for role, part in (("user", row["prompt"]), ("assistant", row["response"])):
            turns += part if isinstance(part, list) else [{"role": role, "content": part}]
    return [_turn(turn) for turn in turns]


def first_turns(rows: dict[str, list]) -> list[str]:
    """What is said first in each of several conversations, given by column."""
    return [conversation(dict(zip(rows, values)))[0]["content"] for values in zip(*rows.values())]


def check(tokenizer: Any, source: object) -> None:
    """`UserError` where the tokenizer has no template, so that a conversation has no form that the model knows."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{source} holds conversations, and the model's tokenizer has no chat template: put the chat_template.jinja of "
            "its chat version into the model's folder, or choose a column of text (...column=NAME)"
        )


def tokens(row: dict[str, Any], tokenizer: Any, loss: str = "all") -> list[int]:
    """The tokens of a conversation, with an end-of-sequence token where the template gives none.

    With `loss="assistant"`, a token that holds anything but what the assistant wrote, with the mark that ends its turn, is
    stored as its complement, ~id: see `data.ids_and_labels`.
    """
    turns = conversation(row)
    if loss == "all":
        ids = tokenizer(_render(tokenizer, turns), add_special_tokens=False, verbose=False).input_ids
    else:
        ids = _marked(tokenizer, turns)
    end = tokenizer.eos_token_id
    if end is None or end in ids or ~end in ids:
        return ids
    return [*ids, ~end if ids and ids[-1] < 0 else end]


def _turn(turn: dict) -> dict[str, Any]:
    speaker = next((turn[key] for key in SPEAKER if turn.get(key) is not None), None)
    said = next((turn[key] for key in SAID if turn.get(key) is not None), None)
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise UserError(f"a conversation has a turn of '{speaker}': the roles are {', '.join(ROLES)}")
    if isinstance(said, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in said]
        if not all(isinstance(part, str) for part in parts):
            raise UserError("a conversation holds pictures or other parts that are no text: leave such rows out")
        said = "".join(parts)
    if said is None and not turn.get("tool_calls"):
        raise UserError(f"a conversation has a turn of '{speaker}' without text ({', '.join(map(str, turn))})")
    rest = {key: value for key, value in turn.items() if key not in (*SPEAKER, *SAID) and value is not None}
    return {"role": role, "content": said or "", **rest}


def _render(tokenizer: Any, turns: list[dict], **more: Any) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **more)
    except Exception as error:  # jinja's, and whatever a template raises
        roles = ", ".join(turn["role"] for turn in turns) or "nobody"
        raise UserError(
            f"the chat template does not take a conversation of {roles}: {error or type(error).__name__}"
        ) from error


def _marked(tokenizer: Any, turns: list[dict]) -> list[int]:
    """The tokens, those that bear no loss as their complements."""
    if not tokenizer.is_fast:
        raise UserError(
            "finetune.loss=assistant needs a tokenizer.json, which tells where in a text a token lies: set finetune.loss=all"
        )
    if MARKED.search(tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return [id_ if ours else ~id_ for id_, ours in zip(found["input_ids"], found["assistant_masks"], strict=True)]
    text = _render(tokenizer, turns)
    spans = list(_spans(tokenizer, turns, text))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(a <= start < end <= b for a, b in spans) for start, end in found.offset_mapping]
    return [id_ if ours else ~id_ for id_, ours in zip(found.input_ids, inside, strict=True)]


def _spans(tokenizer: Any, turns: list[dict], text: str) -> Iterator[tuple[int, int]]:
    """Where in the text the assistant's turns lie: what each adds to the text of the turns before it, after the beginning
    of an answer (`add_generation_prompt`). Refused where the template writes earlier turns otherwise in a longer text."""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:number], add_generation_prompt=True) if number else ""
        after = _render(tokenizer, turns[: number + 1])
        if not number and (said := after.find(turn["content"])) >= 0:
            before = after[:said]  # nobody asked: only what stands before the words is not the assistant's
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"the chat template writes turn {number + 1}, the assistant's, otherwise where the conversation goes on, so "
                "its tokens cannot be told exactly: add {% generation %} marks to the template, or set finetune.loss=all"
            )
        yield len(before), len(after)

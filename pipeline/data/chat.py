"""Turns chat data in any of the usual formats into tokens, and marks those that the assistant wrote.

A conversation is rendered by the chat template of the model's tokenizer only.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any

from transformers.utils import chat_template_utils

from pipeline.runtime.errors import UserError

# role names of ShareGPT and others
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **{role: role for role in ("system", "developer")},
}
SPEAKER, CONTENT = ("role", "from"), ("content", "value")
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")  # starts the assistant's text in a template


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, or a dict of lists, as `datasets` returns a sequence of structs."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(part, list) for part in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def is_chat(columns: Iterable[str]) -> bool:
    """Whether rows with these columns, in the form of `sources.documents`, are conversations."""
    return not {"text", "input_ids"} & set(columns)


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row with `messages`, or with `prompt` and `response`, as {"role", "content", ...}.

    Raises `UserError` if a turn has an unknown role or holds more than text.
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
    """The text of the first turn of each conversation; `rows` are columns."""
    return [conversation(dict(zip(rows, values)))[0]["content"] for values in zip(*rows.values())]


def check(tokenizer: Any, source: object) -> None:
    """Raises `UserError` if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{source} holds conversations, but the model's tokenizer has no chat template: put the chat_template.jinja of "
            "its chat version into the model's folder, or set ...column=NAME to a column of text"
        )


def tokens(row: dict[str, Any], tokenizer: Any, loss: str = "all") -> list[int]:
    """The token ids of a conversation, with an end-of-sequence token if the template adds none.

    With `loss="assistant"`, every token outside the assistant's words and end-of-turn mark is stored as its complement ~id:
    see `token_windows.ids_and_labels`. Raises `UserError` if the template cannot render or mark the conversation.
    """
    turns = conversation(row)
    if loss == "all":
        ids = tokenizer(_render(tokenizer, turns), add_special_tokens=False, verbose=False).input_ids
    else:
        ids = _assistant_tokens(tokenizer, turns)
    end = tokenizer.eos_token_id
    if end is None or end in ids or ~end in ids:
        return ids
    return [*ids, ~end if ids and ids[-1] < 0 else end]


def _turn(turn: dict) -> dict[str, Any]:
    speaker = next((turn[key] for key in SPEAKER if turn.get(key) is not None), None)
    content = next((turn[key] for key in CONTENT if turn.get(key) is not None), None)
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise UserError(f"a conversation has a turn by '{speaker}': the known roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError("a conversation holds pictures or other parts that are not text: remove such rows")
        content = "".join(parts)
    if content is None and not turn.get("tool_calls"):
        raise UserError(f"a conversation has a turn by '{speaker}' without text ({', '.join(map(str, turn))})")
    rest = {key: value for key, value in turn.items() if key not in (*SPEAKER, *CONTENT) and value is not None}
    return {"role": role, "content": content or "", **rest}


class _SameDay(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_SameDay":
        return cls(2024, 7, 26)  # the date in Llama 3's template for when it cannot ask


@contextmanager
def _rendering(turns: list[dict]) -> Iterator[None]:
    """Gives templates that write today's date (Llama 3, Mistral, gpt-oss) always the same one: else a repeated or resumed run
    would read another text. A template's errors become `UserError`."""
    original = chat_template_utils.datetime
    chat_template_utils.datetime = _SameDay
    try:
        yield
    except Exception as error:  # jinja's errors, and whatever a template raises
        roles = ", ".join(turn["role"] for turn in turns) or "nobody"
        raise UserError(
            f"the chat template refuses a conversation of {roles}: {error or type(error).__name__}"
        ) from error
    finally:
        chat_template_utils.datetime = original


def _render(tokenizer: Any, turns: list[dict], **more: Any) -> str:
    with _rendering(turns):
        return tokenizer.apply_chat_template(turns, tokenize=False, **more)


def _render_marked(tokenizer: Any, turns: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the (start, end) of the template's {% generation %} blocks in it."""
    names = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    with _rendering(turns):
        (text,), (spans,) = chat_template_utils.render_jinja_template(
            [turns], return_assistant_tokens_mask=True, **names
        )
    return text, spans


def _assistant_tokens(tokenizer: Any, turns: list[dict]) -> list[int]:
    """The token ids, those without loss as their complements."""
    if not tokenizer.is_fast:
        raise UserError(
            "finetune.loss=assistant needs a tokenizer.json, which maps tokens to text positions: set finetune.loss=all"
        )
    if marked := bool(GENERATION_MARK.search(tokenizer.get_chat_template())):
        text, spans = _render_marked(tokenizer, turns)
    else:
        text = _render(tokenizer, turns)
        spans = list(_spans(tokenizer, turns, text))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, before = [], 0
    for id_, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
        # tokenizers that trim offsets (GPT-NeoX) give a token of spaces none; transformers' own mask then ends or never does
        start, before = before if start == end else start, end
        inside = any(start < b and a < end if marked else a <= start < end <= b for a, b in spans)
        ids.append(id_ if inside else ~id_)
    return ids


def _spans(tokenizer: Any, turns: list[dict], text: str) -> Iterator[tuple[int, int]]:
    """The (start, end) of the assistant's turns in the text: what each turn adds to the text so far, after the start of an
    answer (`add_generation_prompt`). Raises `UserError` if the template rewrites earlier turns in a longer text."""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:number], add_generation_prompt=True) if number else ""
        after = _render(tokenizer, turns[: number + 1])
        if not number and (start := after.find(turn["content"])) >= 0:
            before = after[:start]  # no prompt: the assistant's part starts with its words
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"the chat template writes turn {number + 1}, the assistant's, differently in a longer conversation, so its "
                "tokens cannot be found exactly: add {% generation %} marks to the template, or set finetune.loss=all"
            )
        yield len(before), len(after)

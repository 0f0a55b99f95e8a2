"""Owns what is known of a tokenizer's special tokens against the model's embedding rows: what is refused, what is mended.

A tokenizer's files and a model's need not fit: a padding token that was added and never embedded, none that ends a text, one
that ends every text although it goes on. Found before any work, these are one line; found by torch, an IndexError after hours.
"""

import copy
from typing import Any, NamedTuple

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig

from pipeline.runtime.errors import UserError

PROBE = "a b"


class Around(NamedTuple):
    """What a tokenizer puts before and behind every text."""

    before: list[int]
    behind: list[int]


def around(tokenizer: Any) -> Around:
    """By what it does, for its settings may say otherwise."""
    plain = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer(PROBE, verbose=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Around(whole[:start], whole[start + len(plain) :])
    return Around([], [])


def adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in around(tokenizer).before


def bos(tokenizer: Any) -> int:
    """For `evaluate.bos`; `UserError` where there is none."""
    if tokenizer.bos_token_id is None:
        raise UserError(
            "evaluate.bos=true: the model's tokenizer has no begin-of-sequence token: set evaluate.bos=false"
        )
    return tokenizer.bos_token_id


def rows(config: PreTrainedConfig) -> int:
    """Of the embedding: the ids that the model knows are those below."""
    return config.get_text_config().vocab_size


def check(tokenizer: Any, config: PreTrainedConfig, folder: object) -> None:
    """`UserError` where a token that every text may hold has no embedding row."""
    known = rows(config)
    added = set(tokenizer.get_added_vocab().values())
    highest, name = max(
        ((id_, name) for name, id_ in tokenizer.get_vocab().items() if id_ not in added), default=(0, "")
    )
    if highest >= known:
        raise UserError(
            f"the tokenizer of {folder} has token {highest} ('{name}'), the model only {known} embedding rows: it, or "
            "config.json, is another model's"
        )
    put_around = {id_ for ids in around(tokenizer) for id_ in ids}
    for kind, name, id_ in _special(tokenizer):
        if id_ is not None and id_ >= known and (kind in ("eos", "unk") or id_ in put_around):
            raise UserError(
                f"the tokenizer of {folder} has the {kind} token '{name}' with id {id_}, the model {known} embedding rows: "
                f"set {kind}_token in its tokenizer_config.json to a token that the model knows"
            )


def for_questions(tokenizer: Any, config: PreTrainedConfig) -> tuple[Any, list[str]]:
    """What to ask a model with (tasks, prompts): it has an end-of-sequence and a padding token that the model knows, and
    appends nothing to a text that is to be continued; and what was mended, in words.

    It is the tokenizer itself, or a copy where it would read texts otherwise. `UserError` where there is no token to mend it
    with.
    """
    known, mended, behind = rows(config), [], around(tokenizer).behind
    sound = tokenizer.eos_token_id is not None and not behind and (tokenizer.bos_token_id or 0) < known
    asking = tokenizer if sound else copy.deepcopy(tokenizer)  # a second, of a large vocabulary
    if asking.bos_token_id is not None and asking.bos_token_id >= known:  # not put around, or `check` refuses it
        mended.append(f"bos token '{asking.bos_token}' has id {asking.bos_token_id} of {known}: left out")
        asking.bos_token = None
    if asking.eos_token_id is None:
        own = config.get_text_config().eos_token_id
        own = own[0] if isinstance(own, list) and own else own
        name = asking.convert_ids_to_tokens(own) if isinstance(own, int) and 0 <= own < known else None
        if not (name or asking.bos_token):
            raise UserError(
                "the tokenizer has neither an end-of-sequence nor a begin-of-sequence token, which questions and prompts need: "
                "set eos_token in its tokenizer_config.json, or set evaluate.tasks=[] evaluate.continuations=0"
            )
        asking.eos_token = name or asking.bos_token
        origin = "config.json" if name else "its begin-of-sequence token"
        mended.append(f"it has no end-of-sequence token: '{asking.eos_token}' is taken, from {origin}")
    pad = asking.pad_token_id
    if pad is None or pad >= known:
        instead = next(name for _, name, id_ in _special(asking) if id_ is not None and id_ < known)
        if pad is not None:
            mended.append(f"padding token '{asking.pad_token}' has id {pad} of {known}: '{instead}' pads instead")
        asking.pad_token = instead
    if behind:
        names = " ".join(asking.convert_ids_to_tokens(behind))
        _append_nothing(asking)
        mended.append(f"it appends {names} to every text: not to questions and prompts, which go on")
    return asking, mended


def _special(tokenizer: Any) -> list[tuple[str, str | None, int | None]]:
    """(kind, token, id); in the order in which lm-eval looks for one to pad with."""
    return [(k, getattr(tokenizer, f"{k}_token"), getattr(tokenizer, f"{k}_token_id")) for k in ("unk", "eos", "bos")]


def _append_nothing(tokenizer: Any) -> None:
    before = around(tokenizer).before
    if getattr(tokenizer, "is_fast", False):
        names = tokenizer.convert_ids_to_tokens(before)
        template = [*names, "$A"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, pair=[*template, "$B"], special_tokens=list(dict(zip(names, before)).items())
        )
    elif hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token = False
    if around(tokenizer) != Around(before, []):
        raise UserError(
            "the tokenizer appends a token to every text, so no text can be continued and no task scored: set add_eos_token to "
            "false in its tokenizer_config.json, or set evaluate.tasks=[] evaluate.continuations=0"
        )

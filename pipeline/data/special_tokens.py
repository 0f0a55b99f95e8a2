"""Checks a tokenizer's special tokens against the model's embedding, and fixes what can be fixed.

Tokenizer and model files may disagree: a padding token without an embedding row, no end-of-sequence token, or one appended
even to text that continues. Checked up front, each is a one-line error; in torch it is an IndexError after hours.
"""

import copy
from typing import Any, NamedTuple

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig

from pipeline.runtime.errors import UserError

PROBE = "a b"


class AddedTokens(NamedTuple):
    """The token ids that a tokenizer adds before and after every text."""

    before: list[int]
    after: list[int]


def added_tokens(tokenizer: Any) -> AddedTokens:
    """Observed on a probe text, since the tokenizer's settings may be wrong."""
    without_special = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    with_special = tokenizer(PROBE, verbose=False).input_ids
    for start in range(len(with_special) - len(without_special) + 1):
        if with_special[start : start + len(without_special)] == without_special:
            return AddedTokens(with_special[:start], with_special[start + len(without_special) :])
    return AddedTokens([], [])


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts every text with its begin-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in added_tokens(tokenizer).before


def bos(tokenizer: Any) -> int:
    """The begin-of-sequence token for `evaluate.bos`. Raises `UserError` if there is none."""
    if tokenizer.bos_token_id is None:
        raise UserError(
            "evaluate.bos=true: the model's tokenizer has no begin-of-sequence token: set evaluate.bos=false"
        )
    return tokenizer.bos_token_id


def embedding_rows(config: PreTrainedConfig) -> int:
    """The number of embedding rows; valid token ids are below it."""
    return config.get_text_config().vocab_size


def check(tokenizer: Any, config: PreTrainedConfig, folder: object) -> None:
    """Raises `UserError` if a token that any text may contain has no embedding row."""
    known = embedding_rows(config)
    added = set(tokenizer.get_added_vocab().values())
    highest, name = max(
        ((id_, name) for name, id_ in tokenizer.get_vocab().items() if id_ not in added), default=(0, "")
    )
    if highest >= known:
        raise UserError(
            f"the tokenizer of {folder} has token {highest} ('{name}'), but the model only {known} embedding rows: is the "
            "tokenizer or config.json another model's?"
        )
    added = {id_ for ids in added_tokens(tokenizer) for id_ in ids}
    for kind, name, id_ in _special(tokenizer):
        if id_ is not None and id_ >= known and (kind in ("eos", "unk") or id_ in added):
            raise UserError(
                f"the tokenizer of {folder} has the {kind} token '{name}' with id {id_}, but the model {known} embedding rows: "
                f"set {kind}_token in its tokenizer_config.json to a token that the model knows"
            )


def for_questions(tokenizer: Any, config: PreTrainedConfig) -> tuple[Any, list[str]]:
    """Returns a tokenizer for tasks and prompts, and a description of each fix. It has end-of-sequence and padding tokens
    that the model knows, and appends nothing to text that is to be continued.

    It is the given tokenizer, or a copy if a fix would change how texts are read. Raises `UserError` if it cannot be fixed.
    """
    known, fixes, after = embedding_rows(config), [], added_tokens(tokenizer).after
    sound = tokenizer.eos_token_id is not None and not after and (tokenizer.bos_token_id or 0) < known
    fixed = tokenizer if sound else copy.deepcopy(tokenizer)  # takes a second for a large vocabulary
    if fixed.bos_token_id is not None and fixed.bos_token_id >= known:  # never added to texts, else `check` refuses it
        fixes.append(f"bos token '{fixed.bos_token}' has id {fixed.bos_token_id} of {known}: left out")
        fixed.bos_token = None
    if fixed.eos_token_id is None:
        own = config.get_text_config().eos_token_id
        own = own[0] if isinstance(own, list) and own else own
        name = fixed.convert_ids_to_tokens(own) if isinstance(own, int) and 0 <= own < known else None
        if not (name or fixed.bos_token):
            raise UserError(
                "the tokenizer has neither an end-of-sequence nor a begin-of-sequence token, which tasks and prompts need: "
                "set eos_token in its tokenizer_config.json, or set evaluate.tasks=[] evaluate.continuations=0"
            )
        fixed.eos_token = name or fixed.bos_token
        origin = "config.json" if name else "its begin-of-sequence token"
        fixes.append(f"no end-of-sequence token: uses '{fixed.eos_token}' from {origin}")
    pad = fixed.pad_token_id
    if pad is None or pad >= known:
        replacement = next(name for _, name, id_ in _special(fixed) if id_ is not None and id_ < known)
        if pad is not None:
            fixes.append(f"padding token '{fixed.pad_token}' has id {pad} of {known}: uses '{replacement}'")
        fixed.pad_token = replacement
    if after:
        names = " ".join(fixed.convert_ids_to_tokens(after))
        _stop_appending(fixed)
        fixes.append(f"appends {names} to every text: left out of questions and prompts, which continue")
    return fixed, fixes


def _special(tokenizer: Any) -> list[tuple[str, str | None, int | None]]:
    """(kind, token, id) in the order in which lm-eval looks for a padding token."""
    return [(k, getattr(tokenizer, f"{k}_token"), getattr(tokenizer, f"{k}_token_id")) for k in ("unk", "eos", "bos")]


def _stop_appending(tokenizer: Any) -> None:
    before = added_tokens(tokenizer).before
    if getattr(tokenizer, "is_fast", False):
        names = tokenizer.convert_ids_to_tokens(before)
        template = [*names, "$A"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, pair=[*template, "$B"], special_tokens=list(dict(zip(names, before)).items())
        )
    elif hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token = False
    if added_tokens(tokenizer) != AddedTokens(before, []):
        raise UserError(
            "the tokenizer appends a token to every text, so prompts and tasks cannot be continued: set add_eos_token to "
            "false in its tokenizer_config.json, or set evaluate.tasks=[] evaluate.continuations=0"
        )

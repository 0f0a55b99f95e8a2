"""Cuts text into token windows for calibration, training and perplexity. All sampling is seeded.

Shapes: a window is (seq_len,) token ids. With finetune.loss=assistant, a token without loss is stored as its complement
~id, which is negative, so that one tensor holds both through packing, sharding and resuming.
"""

import random
from array import array

import torch
from torch import Tensor

from pipeline.data import chat
from pipeline.data.sources import KNOWN, Source, documents
from pipeline.runtime.errors import UserError

CHUNK = 1000  # documents tokenised at once: ten times faster than one at a time
IGNORED = -100  # label of a token without loss, as in torch and transformers


def ids_and_labels(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Splits stored windows into token ids and labels, with label IGNORED for tokens without loss."""
    if not (windows < 0).any():
        return windows, windows
    return torch.where(windows < 0, ~windows, windows), windows.masked_fill(windows < 0, IGNORED)


def joined(source: Source, tokenizer, seq_len: int | None = None) -> Tensor:
    """All tokens of the split in one row, (tokens,): documents joined as in the papers (default: a blank line).

    Of C4's validation split, the papers use 256 windows of `seq_len` tokens from the first 1100 documents.
    """
    rows = documents(source)
    if "input_ids" in rows.column_names:
        return torch.tensor([token for ids in rows["input_ids"] for token in ids])
    if chat.is_chat(rows.column_names):
        return torch.tensor([token for row in rows for token in chat_tokens(row, tokenizer, source)])
    known = KNOWN.get(source.name)
    separator = (known.separators if known and known.separators else {}).get(source.split, "\n\n")
    if source.name == "c4" and source.split == "validation":
        ids = _ids(tokenizer, separator.join(rows.select(range(min(1100, len(rows))))["text"]))
        return ids[: 256 * seq_len] if seq_len else ids
    return _ids(tokenizer, separator.join(rows["text"]))


def packed(
    source: Source, tokenizer, seq_len: int, samples: int, seed: int, once: str | None = None, loss: str = "all"
) -> Tensor:
    """(samples, seq_len) int32 windows over the shuffled documents, end to end.

    Documents are reshuffled when they run out. `once` forbids that and names the recipe section for the `UserError`.
    `loss`: see `finetune.loss`; `assistant` needs conversations.
    """
    rows, enough = documents(source), samples * seq_len
    order = list(range(len(rows)))
    draw = random.Random(seed)
    tokens = array("i")  # a list of Python ints takes nine times the memory
    while len(tokens) < enough:
        before = len(tokens)
        draw.shuffle(order)
        for start in range(0, len(order), CHUNK):
            for ids in tokenised(rows[order[start : start + CHUNK]], tokenizer, source, loss):
                tokens.extend(ids)
            if len(tokens) >= enough:
                break
        if len(tokens) == before:
            raise UserError(f"{source} holds no text")
        if len(tokens) < enough and once:
            there = len(tokens) // seq_len
            fewer = f"set {once}.samples={there}" if there else f"set a longer text or a shorter {once}.seq_len"
            raise UserError(
                f"{source} has {len(tokens)} tokens, but {samples} samples of {seq_len} are needed: {fewer}"
            )
    found = torch.frombuffer(tokens, dtype=torch.int32)[:enough].view(samples, seq_len)
    if loss != "all" and (found < 0).all():
        raise UserError(f"{source} holds no answers of an assistant to learn from: set finetune.loss=all")
    return found


def calibration(
    source: Source, tokenizer, samples: int, seq_len: int, seed: int, section: str = "calibration"
) -> Tensor:
    """(samples, seq_len) token windows, drawn as in the papers for known data sets, else packed without repetition.

    C4: draws documents until one is longer than seq_len tokens, then a random window of it (SparseGPT, Wanda).
    WikiText-2 and PTB: random windows of the joined text. `section` is the recipe section, for errors.
    """
    if source.name == "c4":
        return _windows_of_documents(source, tokenizer, samples, seq_len, random.Random(seed), section)
    if source.name in KNOWN:
        ids = joined(source, tokenizer)
        if len(ids) <= seq_len:
            raise UserError(
                f"{source} has {len(ids)} tokens, too few for a window: set {section}.seq_len={len(ids) // 2}"
            )
        draw = random.Random(seed)
        starts = [draw.randint(0, len(ids) - seq_len - 1) for _ in range(samples)]
        return torch.stack([ids[start : start + seq_len] for start in starts])
    return packed(source, tokenizer, seq_len, samples, seed, section)


def _windows_of_documents(
    source: Source, tokenizer, samples: int, seq_len: int, draw: random.Random, section: str
) -> Tensor:
    rows = documents(source)
    windows = []
    misses = 0
    while len(windows) < samples:
        row = rows[draw.randint(0, len(rows) - 1)]
        ids = torch.tensor(row["input_ids"]) if "input_ids" in row else _ids(tokenizer, row["text"])
        if len(ids) <= seq_len:
            misses += 1
            if misses > 100 * samples + 10 * len(rows):
                raise UserError(
                    f"{source} has hardly any document of more than {seq_len} tokens: set a shorter {section}.seq_len"
                )
            continue
        start = draw.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return torch.stack(windows)


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids)  # verbose would warn that it exceeds the context


def chat_tokens(row: dict, tokenizer, source: Source, loss: str = "all") -> list[int]:
    """`chat.tokens`, with the source named in its errors."""
    chat.check(tokenizer, source)
    try:
        return chat.tokens(row, tokenizer, loss)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def require_conversations(source: Source, columns) -> None:
    """Raises `UserError` if rows with these columns are not conversations."""
    if not chat.is_chat(columns):
        raise UserError(f"{source} holds no conversations, which finetune.loss=assistant needs: set finetune.loss=all")


def tokenised(rows: dict[str, list], tokenizer, source: Source, loss: str = "all") -> list[list[int]]:
    """The tokens of each document, followed by the end-of-sequence token if the tokenizer has one."""
    if loss != "all":
        require_conversations(source, rows)
    if "input_ids" in rows:
        return rows["input_ids"]
    if chat.is_chat(rows):
        turns = (dict(zip(rows, values)) for values in zip(*rows.values()))
        return [chat_tokens(row, tokenizer, source, loss) for row in turns]
    end = tokenizer.eos_token_id
    found = tokenizer(rows["text"], verbose=False).input_ids
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]

"""Owns the token windows that are cut from text: for calibration, for training, for perplexity. All are seeded.

Shapes: a window is (seq_len,) token ids.
"""

import random
from array import array

import torch
from datasets import Dataset
from torch import Tensor

from pipeline.errors import UserError
from pipeline.sources import KNOWN, Source, documents


def joined(source: Source, tokenizer) -> Tensor:
    """All tokens of the split as one row, (tokens,): the documents joined as the papers join them (default a blank line)."""
    rows = documents(source)
    if "input_ids" in rows.column_names:
        return torch.tensor([token for ids in rows["input_ids"] for token in ids])
    known = KNOWN.get(source.name)
    separator = (known.separators if known and known.separators else {}).get(source.split, "\n\n")
    if source.name == "c4" and source.split == "validation":
        rows = rows.select(range(min(1100, len(rows))))  # the papers' excerpt: 256 windows of its first 1100 documents
    return _ids(tokenizer, separator.join(rows["text"]))


def packed(source: Source, tokenizer, seq_len: int, samples: int, seed: int) -> Tensor:
    """(samples, seq_len) windows of the documents in a shuffled order, end to end; the order begins anew when it ends."""
    rows = documents(source)
    order = list(range(len(rows)))
    draw = random.Random(seed)
    tokens = array("i")  # a list of Python ints takes nine times the memory
    while len(tokens) < samples * seq_len:
        draw.shuffle(order)
        before = len(tokens)
        for row in order:
            tokens.extend(_document(rows[row], tokenizer))
            if len(tokens) >= samples * seq_len:
                break
        if len(tokens) == before:
            raise UserError(f"{source} holds no text")
    return torch.frombuffer(tokens, dtype=torch.int32)[: samples * seq_len].view(samples, seq_len)


def calibration(source: Source, tokenizer, samples: int, seq_len: int, seed: int) -> Tensor:
    """(samples, seq_len) token windows, drawn as the papers draw them for c4 and wikitext2, else packed and no token twice.

    C4: documents at random until one is longer than seq_len tokens, then a random window of it (SparseGPT and Wanda).
    WikiText-2 and PTB: random windows of the joined text.
    """
    if source.name == "c4":
        return _windows_of_documents(source, tokenizer, samples, seq_len, random.Random(seed))
    if source.name in KNOWN:
        ids = joined(source, tokenizer)
        if len(ids) <= seq_len:
            raise UserError(
                f"{source} has {len(ids)} tokens, too few for a window: type calibration.seq_len={len(ids) // 2}"
            )
        draw = random.Random(seed)
        starts = [draw.randint(0, len(ids) - seq_len - 1) for _ in range(samples)]
        return torch.stack([ids[start : start + seq_len] for start in starts])
    available = _count_up_to(documents(source), tokenizer, samples * seq_len)
    if available < samples * seq_len:
        raise UserError(
            f"{source} has {available} tokens, calibration asks for {samples} x {seq_len}: "
            f"type calibration.samples={max(1, available // seq_len)} or a shorter calibration.seq_len"
        )
    return packed(source, tokenizer, seq_len, samples, seed)


def _windows_of_documents(source: Source, tokenizer, samples: int, seq_len: int, draw: random.Random) -> Tensor:
    rows = documents(source)
    windows = []
    misses = 0
    while len(windows) < samples:
        ids = torch.tensor(_raw_ids(rows[draw.randint(0, len(rows) - 1)], tokenizer))
        if len(ids) <= seq_len:
            misses += 1
            if misses > 100 * samples + 10 * len(rows):
                raise UserError(
                    f"{source} has hardly a document of more than {seq_len} tokens: type a shorter calibration.seq_len"
                )
            continue
        start = draw.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return torch.stack(windows)


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(
        tokenizer(text, verbose=False).input_ids
    )  # verbose: no warning that all of it exceeds the context


def _raw_ids(row: dict, tokenizer) -> list[int]:
    return row["input_ids"] if "input_ids" in row else tokenizer(row["text"], verbose=False).input_ids


def _document(row: dict, tokenizer) -> list[int]:
    """The tokens of a document, ended by the tokenizer's end-of-sequence token where it has one."""
    ids = _raw_ids(row, tokenizer)
    if "input_ids" in row or tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _count_up_to(rows: Dataset, tokenizer, enough: int) -> int:
    count = 0
    for row in rows:
        count += len(_document(row, tokenizer))
        if count >= enough:
            break
    return count

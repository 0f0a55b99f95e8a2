"""Reads the rows of a source, from files or the hub, and finds the columns that hold the text.

A row has `text`, `input_ids`, or a conversation: `messages`, or `prompt` and `response`.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_dataset, load_from_disk

from pipeline.data import chat, digits, image_files, text_files
from pipeline.runtime import caches, files
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.sources import Source

# columns to read if the recipe sets none, in this order; two columns together make a conversation
COLUMNS = (
    ("input_ids",),
    ("text",),
    ("messages",),
    ("conversations",),
    ("prompt", "response"),
    ("prompt", "completion"),
)


def documents(source: "Source") -> Dataset:
    """All rows, with a column `text`, `input_ids` or `messages`, or `prompt` and `response`. Raises `UserError` if there
    are none or they are unreadable."""
    if source.name == "world":
        from pipeline.data import world

        return Dataset.from_dict({"text": world.documents(source.split)})
    rows = loaded(source)
    columns = _columns(source, rows)
    if columns[0] not in rows.column_names:
        rows = rows.flatten()
    rows = rows.select_columns(columns)
    if any(rows.data.column(column).null_count for column in columns):
        # in memory: `datasets` would write to the user's folder, if it is one of save_to_disk
        rows = rows.filter(lambda *values: None not in values, input_columns=columns, keep_in_memory=True)
    if len(rows) == 0:
        raise UserError(f"{source} holds no text")
    beginning = rows.select(range(min(100, len(rows))))
    kind = _kind(source, columns, next((row for row in beginning if row[columns[0]]), rows[0]))
    named = dict(zip(columns, ("prompt", "response") if len(columns) == 2 else (kind,)))
    return rows.rename_columns({old: new for old, new in named.items() if old != new})


def first_rows(source: "Source") -> Iterator[dict[str, Any]]:
    """Yields non-empty rows of a local source in the form of `documents`, without reading ahead."""
    rows = iter(loaded(source, streaming=source.form != text_files.SAVED))
    columns: list[str] = []
    wanted = set(source.columns[0]) if len(source.columns) == 1 else set()
    # the structs that hold the column
    above = {name[:end] for name in wanted for end, letter in enumerate(name) if letter == "."}
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreadable(source, error) from error
        if row is None:
            return
        row = _flat(row) | row
        if not wanted <= row.keys() and any(row.get(place, "") is None for place in above):
            continue
        columns = columns or _columns(source, row)
        if any(row.get(column) in (None, []) for column in columns):
            continue
        kind = _kind(source, columns, row)
        names = ("prompt", "response") if len(columns) == 2 else (kind,)
        yield {name: row[column] for name, column in zip(names, columns)}


def loaded(source: "Source", streaming: bool = False):
    """The rows as they are stored. Raises `UserError` if they cannot be read."""
    if source.rows is not None:
        return source.rows
    if source.form == image_files.IMAGES or source.name == digits.NAME:
        raise UserError(f"{source} holds images, not text: set {source.section} to a data set of text")
    try:
        if source.form == text_files.SAVED:
            return load_from_disk(str(Path(source.files[0]).parent))
        if source.files:
            local = source.is_local  # local names may contain * and the like
            paths = [glob.escape(path if local else _downloaded(path)) for path in source.files]
            state = {"description": _state(source.files)} if local else {}
            return load_dataset(
                source.form, data_files={source.split: paths}, split=source.split, streaming=streaming, **state
            )
        return load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # datasets, pyarrow, gzip and the hub raise their own types
        raise _unreadable(source, error) from error


def _downloaded(path: str) -> str:
    """The path in the hub's cache of hf://datasets/OWNER/NAME/FILE. `datasets` would ask the hub in every run, and fail without
    a network."""
    from huggingface_hub import hf_hub_download

    owner, name, file = path.removeprefix("hf://datasets/").split("/", 2)
    return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")


def _state(paths: Iterable[str]) -> str:
    """Becomes a part of the name of the cache of `datasets`, which by itself tells contents of a path apart only by their time
    of modification: copies, archives and container images may keep it."""
    return files.digest([[stat.st_size, stat.st_ctime_ns] for stat in map(os.stat, paths)])


def _unreadable(source: "Source", error: Exception) -> UserError:
    if cache := caches.problem(error):
        return UserError(cache)
    reason = str(error.__cause__ or error) or type(error).__name__
    return UserError(f"cannot load {source}: {' '.join(reason.split())[:300]}")


def _columns(source: "Source", rows: Dataset | dict) -> list[str]:
    """The columns that hold the text. Raises `UserError` if there are none."""
    there = list(rows) if isinstance(rows, dict) else rows.column_names
    if found := next((list(columns) for columns in source.columns if set(columns) <= set(there)), None):
        return found
    if isinstance(rows, dict):
        nested = [name for name in there if not isinstance(rows[name], dict)]
    else:
        nested = rows.flatten().column_names
    (last,) = source.columns[-1][:1]
    if len(source.columns) == 1 and last in nested:
        return [last]
    missing = f"'{last}'" if source.columns != COLUMNS else "'text' or 'input_ids'"
    raise UserError(
        f"{source} has no column {missing}: it has {', '.join(nested)}; set {source.section}.column to the one with the text"
    )


def _kind(source: "Source", columns: list[str], row: dict) -> str:
    """What a row holds: text, input_ids or messages. Raises `UserError` if it does not fit the column's name."""
    if len(columns) == 2:
        return "messages"
    (column,) = columns
    value = row[column]
    kinds = {
        "text": isinstance(value, str),
        "input_ids": isinstance(value, list) and all(isinstance(token, int) for token in value),
        "messages": chat.is_conversation(value),
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    wanted = {"input_ids": "token ids", "messages": "a conversation", "conversations": "a conversation"}.get(
        column, "text"
    )
    if kind is None or (wanted == "token ids" and kind != "input_ids") or (value == [] and column != "input_ids"):
        raise UserError(f"column '{column}' of {source} should hold {wanted}, but its first row is {str(value)[:60]}")
    return kind


def _flat(row: dict, prefix: str = "") -> dict[str, Any]:
    """Flattens nested columns to dotted names, as `Dataset.flatten` does."""
    found = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found

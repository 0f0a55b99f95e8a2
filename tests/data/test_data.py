"""Data sets are found by name, and windows are cut as in the papers and reproducibly."""

import gzip
import json
import random

import pytest
import torch
from datasets import Dataset

from pipeline.data import sources, token_windows, world
from pipeline.runtime.errors import UserError

TEXTS = world.documents("test")[:60]


@pytest.fixture(scope="module")
def tokenizer():
    return world.tokenizer()


@pytest.fixture
def mirror(tmp_path):
    """A folder laid out as the hub: a data set of ours, the papers' shard of C4, and the tokenised WikiText-2."""
    for name, config, split in [("mine/stories", "default", "train"), ("Salesforce/wikitext", "wikitext-2-v1", "test")]:
        folder = tmp_path / name / config
        folder.mkdir(parents=True)
        Dataset.from_dict({"text": TEXTS}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    folder = tmp_path / "allenai/c4/en"
    folder.mkdir(parents=True)
    with gzip.open(folder / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS)
    return str(tmp_path)


@pytest.mark.parametrize("form", ["parquet", "json", "jsonl", "jsonl.gz", "txt", "folder"])
def test_local_files_of_every_format(tmp_path, form):
    path = tmp_path / f"text.{form}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    if form == "parquet":
        Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text(lines)
        (path / "test.jsonl").write_text('{"text": "other"}\n')
    else:
        path.write_text("\n".join(TEXTS) if form == "txt" else lines)
    assert sources.documents(sources.source(str(path)))["text"] == TEXTS


def test_input_ids_are_used_unchanged(tmp_path, tokenizer):
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    Dataset.from_dict({"input_ids": ids}).to_parquet(tmp_path / "ids.parquet")
    found = token_windows.calibration(sources.source(str(tmp_path / "ids.parquet")), tokenizer, 2, 4, seed=0)
    assert sorted(found.tolist()) == ids


def test_dataset_names_in_a_mirror(mirror):
    assert sources.documents(sources.source("mine/stories", mirror))["text"] == TEXTS
    assert sources.documents(sources.source("c4", mirror))["text"] == TEXTS
    chosen = sources.source("wikitext2:wikitext-2-v1@test", mirror)
    assert (chosen.config, chosen.split, chosen.note) == ("wikitext-2-v1", "test", None)
    instead = sources.source("wikitext2", mirror, split="test")
    assert instead.files == chosen.files
    assert "not comparable with published numbers" in instead.note


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mine/stories@validation", "splits there: train"),
        ("mine/tales", "tales/default/train-"),
        ("wikitext2:wikitext-103-v1@test", "wikitext-103-v1/test-"),
        ("./nowhere.txt", "no dataset at"),
    ],
)
def test_missing_data_is_named(mirror, spec, says):
    with pytest.raises(UserError, match=says):
        sources.source(spec, mirror)


def test_without_a_text_column_the_columns_are_named(tmp_path):
    Dataset.from_dict({"story": TEXTS}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="it has story"):
        sources.documents(sources.source(str(tmp_path / "x.parquet")))


def test_c4_perplexity_uses_the_papers_excerpt(mirror, tokenizer):
    """256 windows of the first 1100 documents of the validation split, joined by spaces."""
    texts = [TEXTS[i % 60] for i in range(1200)]
    path = f"{mirror}/allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    source = sources.source("c4", mirror, "validation")
    expected = tokenizer(" ".join(texts[:1100])).input_ids
    assert token_windows.joined(source, tokenizer, 40).tolist() == expected[: 256 * 40]
    assert token_windows.joined(source, tokenizer, 4000).tolist() == expected


def test_c4_windows_are_drawn_as_in_the_papers(mirror, tokenizer):
    """Draws documents until one is longer than the window, then a random window, in the same order of draws."""
    found = token_windows.calibration(sources.source("c4", mirror), tokenizer, 6, 40, seed=3)
    draw, expected = random.Random(3), []
    for _ in range(6):
        while True:
            ids = tokenizer(TEXTS[draw.randint(0, len(TEXTS) - 1)]).input_ids
            if len(ids) > 40:
                break
        start = draw.randint(0, len(ids) - 40 - 1)
        expected.append(ids[start : start + 40])
    assert found.tolist() == expected


def test_packed_windows_hold_each_document_exactly_once(mirror, tokenizer):
    source = sources.source("mine/stories", mirror)
    total = sum(len(tokenizer(text).input_ids) + 1 for text in TEXTS)
    windows = token_windows.packed(source, tokenizer, 16, total // 16, seed=0)
    assert torch.equal(windows, token_windows.packed(source, tokenizer, 16, total // 16, seed=0))
    assert not torch.equal(windows, token_windows.packed(source, tokenizer, 16, total // 16, seed=1))
    stories = tokenizer.decode(windows.flatten()).split("<eos>")
    assert {story.strip() for story in stories[:-1]} <= {
        f"<bos> {text}".strip() for text in map(again(tokenizer), TEXTS)
    }
    assert len(token_windows.packed(source, tokenizer, 16, 3 * total // 16, seed=0)) == 3 * total // 16


def again(tokenizer):
    return lambda text: tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)


def test_too_little_text_says_what_to_set(mirror, tokenizer):
    with pytest.raises(UserError, match=r"set calibration\.samples="):
        token_windows.calibration(sources.source("mine/stories", mirror), tokenizer, 1000, 64, seed=0)
    with pytest.raises(UserError, match=r"a shorter calibration\.seq_len"):
        token_windows.calibration(sources.source("c4", mirror), tokenizer, 4, 4000, seed=0)


def test_joined_text_is_as_in_the_papers(mirror, tokenizer):
    ids = token_windows.joined(sources.source("wikitext2", mirror, split="test"), tokenizer)
    assert ids.tolist() == tokenizer("\n\n".join(TEXTS)).input_ids

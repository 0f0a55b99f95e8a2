"""For each layout of files and setting, the text that is read or the error. Missing and ambiguous data is refused, and the
message says which data exists."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import constants

from pipeline.data import sources
from pipeline.runtime.errors import UserError

LINES = ["one", "two"]


def jsonl(*texts: str, column: str = "text") -> bytes:
    return "".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts).encode()


def parquet(*texts: str, column: str = "text") -> Callable[[Path], object]:
    return lambda path: Dataset.from_dict({column: list(texts)}).to_parquet(path)


def saved(**splits: str) -> Callable[[Path], object]:
    datasets = {split: Dataset.from_dict({"text": [text]}) for split, text in splits.items()}
    return lambda path: (DatasetDict(datasets) if list(datasets) != ["only"] else datasets["only"]).save_to_disk(path)


def write_layout(folder: Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


HUB = {
    "train-00000-of-00001.parquet": parquet("train"),
    "test-00000-of-00001.parquet": parquet("test"),
    "README.md": "# words",
    "dataset_infos.json": "{}",
}
C4 = {
    **{
        f"{at}/c4-train.0000{i}-of-01024.json.gz": gzip.compress(jsonl(f"{at} {i}"))
        for at in ("en", "de")
        for i in "01"
    },
    "en/c4-validation.00000-of-00008.json.gz": gzip.compress(jsonl("held out")),
    ".git/index.json": "{}",
    ".cache/huggingface/download/a.json": "{}",
}
SFT = {f"data/{split}-00000-of-00001-a3ec.parquet": parquet(split) for split in ("train_sft", "train_gen", "test_sft")}
PARTS = {f"part-0000{i}-of-00002.parquet": parquet(str(i)) for i in range(2)}
DIRECTORIES = {"train/a.jsonl": jsonl("a"), "train/b.jsonl": jsonl("b"), "test/a.jsonl": jsonl("c")}
WITH_NAMES = {"a.txt": "a", "my train trip.txt": "b", "testimony.txt": "c"}

READ = {
    "a split of a clone": (HUB, "{here}@test", ["test"]),
    "the usual split of a clone": (HUB, "{here}", ["train"]),
    "C4 as cloned": (C4, "{here}:en@train", ["en 0", "en 1"]),
    "another split of it": (C4, "{here}:en@validation", ["held out"]),
    "the folder of a configuration": (C4, "{here}/de", ["de 0", "de 1"]),
    "a split by another name": ({"dev.jsonl": jsonl("dev"), "train.jsonl": jsonl("x")}, "{here}@validation", ["dev"]),
    "a split's own name": (SFT, "{here}@train_sft", ["train_sft"]),
    "shards that name no split": (PARTS, "{here}", ["0", "1"]),
    "folders named after splits": (DIRECTORIES, "{here}@train", ["a", "b"]),
    "shards in folders named after splits": (
        {
            f"{split}/{year}/part-00000-of-00001.parquet": parquet(split + year)
            for split in ("train", "test")
            for year in "12"
        },
        "{here}",
        ["train1", "train2"],
    ),
    "several files of one split": (
        {"train_1.jsonl": jsonl("1"), "train_2.jsonl": jsonl("2"), "valid.jsonl": jsonl("v")},
        "{here}",
        ["1", "2"],
    ),
    "split names with words before them": (
        {"wiki.train.txt": "a", "wiki.valid.txt": "b", "wiki.test.txt": "c"},
        "{here}@validation",
        ["b"],
    ),
    "texts whose names hold such words": (WITH_NAMES, "{here}", ["a", "b", "c"]),
    "a folder of folders": ({"x/1.txt": "1", "y/z/2.txt": "2"}, "{here}", ["1", "2"]),
    "parquet beside dataset_info.json": (
        {"part-0.parquet": parquet("one"), "dataset_info.json": "{}", "state.json": "{}"},
        "{here}",
        ["one"],
    ),
    "text beside meta.json": ({"a.txt": "one", "meta.json": '{"text": "no"}', "LICENSE.txt": "no"}, "{here}", ["one"]),
    "save_to_disk": ({"": saved(only="one")}, "{here}", ["one"]),
    "save_to_disk of splits": ({"": saved(train="one", test="two")}, "{here}@test", ["two"]),
    "an .arrow file of it": ({"": saved(only="one")}, "{here}/data-00000-of-00001.arrow", ["one"]),
    ".txt.gz": ({"c.txt.gz": gzip.compress(b"one\ntwo\n")}, "{here}/c.txt.gz", LINES),
    ".txt.xz": ({"c.txt.xz": lzma.compress(b"one\ntwo\n")}, "{here}/c.txt.xz", LINES),
    ".jsonl.bz2": ({"c.jsonl.bz2": bz2.compress(jsonl(*LINES))}, "{here}/c.jsonl.bz2", LINES),
    ".JSONL": ({"c.JSONL": jsonl(*LINES)}, "{here}/c.JSONL", LINES),
    ".csv": ({"c.csv": "n,text\n1,one\n2,two\n"}, "{here}/c.csv", LINES),
    "one list in a .json": ({"c.json": json.dumps([{"text": text} for text in LINES])}, "{here}/c.json", LINES),
    "a file of one split": ({"test.jsonl": jsonl("one")}, "{here}/test.jsonl@test", ["one"]),
    "@ in a path": ({"v@2/a.txt": "one"}, "{here}/v@2", ["one"]),
    "@ in a path and a split": ({"v@2/test.txt": "one", "v@2/train.txt": "x"}, "{here}/v@2@test", ["one"]),
    "@ and : in a file's name": ({"me@home: 1.txt": "one"}, "{here}/me@home: 1.txt", ["one"]),
    "brackets": ({"a[0-9]*?/b].txt": "one"}, "{here}/a[0-9]*?", ["one"]),
    "brackets in a file's name": ({"a[b].jsonl": jsonl("one")}, "{here}/a[b].jsonl", ["one"]),
    "spaces, commas, unicode, #": (
        {"mein Text, größer #1 日本.txt": "one"},
        "{here}/mein Text, größer #1 日本.txt",
        ["one"],
    ),
    "a known name's tokenised rows": ({"x/train.jsonl": jsonl("one")}, "{here}/x", ["one"]),
}


@pytest.mark.parametrize(("files", "spec", "texts"), READ.values(), ids=READ)
def test_datasets_that_are_read(tmp_path, files, spec, texts):
    write_layout(tmp_path / "here", files)
    source = sources.source(spec.format(here=tmp_path / "here"))
    assert sources.documents(source)["text"] == texts
    assert [row["text"] for row in sources.first_rows(source)] == texts
    assert sources.identity(source) != "None"


REFUSED = {
    "a split that is not there": (
        HUB,
        "{here}@validation",
        "has no split 'validation': the splits there are test, train",
    ),
    "the usual split is not there": (
        {"test-00000-of-00001.parquet": parquet("test")},
        "{here}",
        "has no split 'train': the splits there are test",
    ),
    "a split where files name none": ({"a.txt": "a"}, "{here}@test", "its files name no split, so leave out @test"),
    "a split of a file": ({"a.txt": "a"}, "{here}/a.txt@test", "is a single file without a split 'test'"),
    "a part of a split's name": (
        SFT,
        "{here}",
        "has no split 'train': the splits there are test_sft, train_gen, train_sft",
    ),
    "a split of save_to_disk": ({"": saved(train="1", test="2")}, "{here}@dev", "the splits there are train, test"),
    "several configurations": (
        C4,
        "{here}",
        "has configurations de, en: name one of them, such as {here}:en",
    ),
    "no such configuration": (C4, "{here}:fr", "has no configuration 'fr': it has de, en"),
    "two forms": (
        {"a.parquet": parquet("one"), "b.txt": "x"},
        "{here}",
        "holds files of several formats (a.parquet, b.txt): set the path of one file",
    ),
    "JSON lines beside text": ({"a.jsonl": jsonl("one"), "b.txt": "x"}, "{here}", "several formats (a.jsonl, b.txt)"),
    "metadata only": ({"dataset_info.json": "{}", "README.txt": "x"}, "{here}", "it holds no file of text"),
    "a name that tells no form": (
        {"a.gz": gzip.compress(b"x")},
        "{here}/a.gz",
        "must name its format, such as a.jsonl.gz",
    ),
    "another form": ({"a.docx": "x"}, "{here}/a.docx", "the formats are .parquet, .json"),
    "a configuration of nothing": ({}, "{here}/none:en@train", "no dataset at {here}/none"),
    "nothing there": ({}, "{here}/a.txt", "no dataset at"),
    "a pointer of git-lfs": (
        {"a.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        "{here}",
        "is a git-lfs pointer, not text: run git lfs pull",
    ),
    "an empty file": ({"a.txt": ""}, "{here}/a.txt", "is empty"),
    "half a folder of save_to_disk": ({"dataset_dict.json": "{"}, "{here}", "dataset_dict.json is damaged"),
    "shards of several names": (
        {f"{name}-00000-of-00001.parquet": parquet("x") for name in ("human", "machine")},
        "{here}",
        "the splits there are human, machine",
    ),
}


@pytest.mark.parametrize(("files", "spec", "says"), REFUSED.values(), ids=REFUSED)
def test_datasets_that_are_refused(tmp_path, files, spec, says):
    here = tmp_path / "here"
    here.mkdir()
    write_layout(here, files)
    with pytest.raises(UserError) as refusal:
        sources.source(spec.format(here=here))
    assert says.format(here=here) in str(refusal.value)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_layout(
        tmp_path, {"c/test.txt": "one", "c/train.txt": "x", "mirror/a/b/default/test-0.parquet": parquet("two")}
    )
    assert sources.documents(sources.source("~/c@test"))["text"] == ["one"]
    assert sources.documents(sources.source("a/b", "~/mirror", "test"))["text"] == ["two"]
    with pytest.raises(UserError, match="no dataset at ~nobody-here/x"):
        sources.source("~nobody-here/x")


NESTED = json.dumps({"id": 1, "data": {"body": {"text": "one"}, "n": 2}}) + "\n"


@pytest.mark.parametrize("column", ["body", "data.body.text", "a.b"])
def test_a_column_is_chosen_by_name(tmp_path, column):
    """Nested columns with dots, and columns whose name contains a dot."""
    name, content = ("a.jsonl", NESTED) if column.startswith("data") else ("a.parquet", parquet("one", column=column))
    write_layout(tmp_path, {name: content})
    source = sources.source(str(tmp_path / name), column=column)
    assert sources.documents(source)["text"] == ["one"]
    assert list(sources.first_rows(source)) == [{"text": "one"}]


@pytest.mark.parametrize("read", [sources.documents, lambda source: list(sources.first_rows(source))])
def test_a_missing_column_error_lists_the_columns_and_the_key(tmp_path, read):
    write_layout(tmp_path, {"a.jsonl": NESTED})
    for section in ("calibration", "finetune", "evaluate"):
        with pytest.raises(UserError) as refusal:
            read(sources.source(str(tmp_path / "a.jsonl"), section=section))
        assert "no column 'text' or 'input_ids': it has id, data.body.text, data.n" in str(refusal.value)
        assert f"set {section}.column" in str(refusal.value)
    with pytest.raises(UserError, match="no column 'txt': it has id"):
        read(sources.source(str(tmp_path / "a.jsonl"), column="txt"))
    with pytest.raises(UserError, match="column 'id' .* should hold text, but its first row is 1"):
        read(sources.source(str(tmp_path / "a.jsonl"), column="id"))


def test_rows_without_text_are_skipped(tmp_path):
    write_layout(tmp_path, {"a.jsonl": '{"text": null}\n{"text": "a"}\n'})
    assert list(sources.first_rows(sources.source(str(tmp_path / "a.jsonl")))) == [{"text": "a"}]


@pytest.mark.parametrize("first", ['{"data": null}', '{"data": {"body": null, "n": 1}}'])
def test_rows_without_the_struct_of_a_nested_column_are_skipped(tmp_path, first):
    write_layout(tmp_path, {"a.jsonl": f"{first}\n{NESTED}"})
    source = sources.source(str(tmp_path / "a.jsonl"), column="data.body.text")
    assert list(sources.first_rows(source)) == sources.documents(source).to_list() == [{"text": "one"}]


def test_folders_may_be_symbolic_links(tmp_path):
    write_layout(tmp_path, {"a/train.jsonl": '{"text": "a"}\n', "elsewhere/test.jsonl": '{"text": "b"}\n'})
    (tmp_path / "a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "a")
    for split, text in (("train", "a"), ("test", "b")):
        assert sources.documents(sources.source(f"{tmp_path}/a@{split}"))["text"] == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_new_contents_are_read_whatever_their_time_of_modification(tmp_path, name):
    for text in ("one", "two"):
        write_layout(tmp_path, {name: parquet(text) if name.endswith(".parquet") else jsonl(text)})
        os.utime(tmp_path / name, (1, 1))  # as in reproducible container images
        assert sources.documents(sources.source(str(tmp_path / name)))["text"] == [text]


def test_c4_is_found_offline_once_it_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load allenai/c4:en@train: "):
        sources.documents(sources.source("c4"))
    repository, commit = "datasets--allenai--c4", "0" * 40
    shards = {f"snapshots/{commit}/{name}": text for name, text in C4.items()}
    write_layout(tmp_path / repository, {"refs/main": commit, **shards})
    assert sources.documents(sources.source("c4"))["text"] == ["en 0"]


def test_a_saved_data_set_is_neither_changed_nor_mistaken_for_its_caches(tmp_path):
    """`map` and `filter` of `datasets` write cache-*.arrow next to the rows: new ones would run the stages again."""
    Dataset.from_dict({"text": ["a", None, "b"]}).save_to_disk(tmp_path / "saved")
    before, source = sorted(os.listdir(tmp_path / "saved")), sources.source(str(tmp_path / "saved"))
    assert sources.documents(source)["text"] == ["a", "b"]
    assert sorted(os.listdir(tmp_path / "saved")) == before
    load_from_disk(tmp_path / "saved").map(lambda row: {"text": "c"})
    assert sorted(os.listdir(tmp_path / "saved")) != before
    assert sources.identity(sources.source(str(tmp_path / "saved"))) == sources.identity(source)


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    names = [f"{i}.txt" for i in range(12)]
    write_layout(tmp_path, {name: name for name in names})
    assert sources.documents(sources.source(str(tmp_path)))["text"] == sorted(names)


def test_a_relative_folder_works_after_a_change_of_directory(tmp_path, monkeypatch):
    write_layout(tmp_path, {"c/a.txt": "one"})
    monkeypatch.chdir(tmp_path)
    source = sources.source("c")
    os.chdir("/")
    assert sources.documents(source)["text"] == ["one"] and str(source) == "c@train"

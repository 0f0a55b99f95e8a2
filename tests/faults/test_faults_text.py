"""Faults of a text give one-line messages, and the settings that they suggest work."""

import json
import re

import pytest

from pipeline.data import sources
from pipeline.runtime.errors import UserError
from tests import launches
from tests.conftest import PRUNE


@pytest.mark.slow
def test_a_short_text_error_suggests_settings_that_work(tiny_llama, tmp_path, refused, finishes):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat .\n" * 20)
    settings = (f"model={tiny_llama}", f"calibration.dataset={text}")
    line = refused(tmp_path / "run", *settings)
    assert "8 samples of 32 are needed" in line
    finishes(tmp_path / "run", *settings, re.search(r"set (calibration\.samples=\d+)", line)[1])
    text.write_text("the cat\n")
    assert "set a longer text or a shorter calibration.seq_len" in refused(tmp_path / "other", *settings)
    text.write_text("the cat sat on the mat .\n" * 200)
    finishes(tmp_path / "other", *settings)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.txt", "", "is empty"),
        ("text.jsonl", '{"text": "a', "cannot load .* JSON parse error"),
        ("text.json.gz", "text", "cannot load .* [Nn]ot a gzipped file"),
        ("text.parquet", "text", "cannot load .* Parquet file size"),
        ("text.jsonl", '{"text": 3}', "should hold text, but its first row is 3"),
        ("text.jsonl", '{"text": null}', "holds no text"),
        ("text.jsonl", '{"title": "a"}', "no column 'text' or 'input_ids': it has title"),
        ("ids.jsonl", '{"input_ids": [0.5]}', "should hold token ids"),
    ],
)
def test_files_without_text_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        sources.documents(sources.source(str(tmp_path / name)))


def test_rows_without_text_are_skipped(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert sources.documents(sources.source(str(tmp_path / "text.jsonl")))["text"] == ["a"]


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_of_another_vocabulary(tiny_llama, tmp_path, refused, token):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [token] * 256}))
    line = refused(tmp_path / "run", f"model={tiny_llama}", f"calibration.dataset={tmp_path}/ids.jsonl")
    assert f"holds token {token}, but the model knows" in line


@pytest.mark.slow
def test_fewer_batches_than_processes(tiny_llama, tmp_path):
    settings = (f"model={tiny_llama}", *PRUNE, "calibration.samples=2", f"run_dir={tmp_path}/run")
    seen = launches.run(settings, tmp_path / "log", of=2, code=2)
    output = [line for line in seen.splitlines() if line.startswith("espalier: ")]
    assert output == [
        "espalier: 1 batches of calibration samples cannot be shared by 2 processes: set calibration.batch_size=1, or "
        "calibration.samples=4 or more"
    ]
    assert not (tmp_path / "run/prune").exists()

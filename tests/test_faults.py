"""Whatever is wrong with what the prune stage is given, or with the disk it writes to, is said in one line; nothing
half-written counts as done; and once the fault is mended the same command ends as if there had been none."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import launch
from pipeline import models, sources
from pipeline.errors import UserError
from pipeline.masks import Masks
from tests.conftest import QUICK, ROOT, environment, espalier

SETTINGS = (*QUICK, "stages=[prune]")
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture
def typed(monkeypatch, capsys):
    """The command in this process: its exit code, what it said on stdout, and its own lines on stderr."""

    def run(*settings) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *SETTINGS, *map(str, settings)])
        code = launch.main()
        seen = capsys.readouterr()
        return code, seen.out, [line for line in seen.err.splitlines() if line.startswith("espalier: ")]

    return run


@pytest.fixture
def refused(typed):
    """Types the command, and returns the one line that says why it failed."""

    def run(run_dir: Path, *settings) -> str:
        code, _, lines = typed(f"run_dir={run_dir}", *settings)
        assert code == 2 and len(lines) == 1, lines
        assert not (run_dir / "prune").exists()
        return lines[0]

    return run


@pytest.fixture
def finishes(typed):
    """Types the command, and returns the masks' file and what was said."""

    def run(run_dir: Path, *settings) -> tuple[bytes, str]:
        code, said, lines = typed(f"run_dir={run_dir}", *settings)
        assert code == 0, lines
        assert not list(run_dir.rglob("*.part"))
        Masks.load(run_dir / "prune/masks.safetensors")[0].check_patterns()
        return (run_dir / "prune/masks.safetensors").read_bytes(), said

    return run


@pytest.fixture(scope="module")
def whole_masks(tiny_llama, tmp_path_factory) -> bytes:
    """Of a run that met no fault."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch.py", *SETTINGS, f"model={tiny_llama}", f"run_dir={run_dir}"])
        assert launch.main() == 0
    return (run_dir / "prune/masks.safetensors").read_bytes()


@pytest.fixture(scope="module")
def forms(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The same model as one file, as shards with an index, and both with files of torch.save."""
    folder = tmp_path_factory.mktemp("forms")
    found = {"one": tiny_llama}
    for form in ("shards", "bin", "bin shards"):
        found[form] = folder / form
        shutil.copytree(tiny_llama, folder / form)
        (folder / form / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder / "shards", max_shard_size="40KB")
    torch.save(load_file(tiny_llama / "model.safetensors"), folder / "bin/pytorch_model.bin")
    for shard in (folder / "shards").glob("*.safetensors"):
        torch.save(load_file(shard), folder / "bin shards" / as_bin(shard.name))
    index = json.loads((folder / "shards/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: as_bin(file) for name, file in index["weight_map"].items()}
    (folder / "bin shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    return found


def as_bin(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


def cut(name: str, share: float = 0.5):
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def put(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def change_weights(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {name: weight.clone() for name, weight in load_file(path).items()}
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return damage


SECOND = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("form", "damage", "says"),
    [
        ("one", cut("model.safetensors"), r"model.safetensors \(\d+ bytes\) is damaged or was not fetched whole"),
        ("one", cut("model.safetensors", 0), r"model.safetensors \(0 bytes\) is damaged"),
        (
            "one",
            put("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
            r"model.safetensors \(42 bytes\)",
        ),
        ("one", lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        ("shards", cut(SECOND), rf"{SECOND} \(\d+ bytes\) is damaged"),
        ("shards", cut(SECOND, 0), rf"{SECOND} \(0 bytes\) is damaged"),
        ("shards", lambda folder: (folder / SECOND).unlink(), rf"No such file or directory: .*{SECOND}"),
        ("shards", cut("model.safetensors.index.json"), r"model.safetensors.index.json \(\d+ bytes\) is damaged"),
        ("shards", put("model.safetensors.index.json", "[]"), r"index.json \(2 bytes\) is damaged .* no weight_map"),
        (
            "shards",
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "no file named model.safetensors",
        ),
        ("bin", cut("pytorch_model.bin"), r"pytorch_model.bin \(\d+ bytes\) is damaged"),
        ("bin", cut("pytorch_model.bin", 0), r"pytorch_model.bin \(0 bytes\) is damaged .*: EOFError"),
        ("bin shards", cut(as_bin(SECOND)), rf"{as_bin(SECOND)} \(\d+ bytes\) is damaged"),
        ("one", change_weights(lambda weights: weights.pop(UP)), rf"lacks {UP} \(1 missing in all\)"),
        (
            "one",
            change_weights(lambda weights: weights.update({UP: torch.zeros(3, 3)})),
            rf"{UP} is \(3, 3\) in the files",
        ),
        ("one", cut("config.json"), r"config.json \(\d+ bytes\) is damaged"),
        ("one", cut("config.json", 0), r"config.json \(0 bytes\) is damaged"),
        ("one", put("config.json", "{}"), "Should have a `model_type`"),
        ("one", cut("tokenizer.json"), r"no usable tokenizer: tokenizer.json \(\d+ bytes\) is damaged"),
        ("one", put("tokenizer.json", "{}"), "no usable tokenizer"),
        ("one", lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
        ("one", cut("tokenizer_config.json"), r"tokenizer_config.json \(\d+ bytes\) is damaged"),
    ],
)
def test_a_damaged_model_folder(forms, whole_masks, tmp_path, refused, finishes, form, damage, says):
    folder = tmp_path / "model"
    shutil.copytree(forms[form], folder)
    damage(folder)
    line = refused(tmp_path / "run", f"model={folder}")
    assert re.search(says, line), line
    shutil.rmtree(folder)
    shutil.copytree(forms[form], folder)
    assert finishes(tmp_path / "run", f"model={folder}")[0] == whole_masks


@pytest.mark.parametrize("form", ["shards", "bin", "bin shards"])
def test_the_same_model_in_another_form_is_pruned_the_same(forms, whole_masks, tmp_path, finishes, form):
    assert finishes(tmp_path, f"model={forms[form]}")[0] == whole_masks
    assert not list((tmp_path / "prune/model").glob("*.bin*"))
    dense = dict(models.tensors(forms["one"]))
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "prune/model").named_parameters():
        assert weight[weight != 0].equal(dense[name][weight != 0])


@pytest.mark.parametrize(
    ("method", "name", "value", "says"),
    [
        ("wanda", UP, 1e30, "the inputs of model.layers.1.mlp.down_proj.weight are not finite"),
        ("wanda", UP, 3e38, f"scores of {UP} are not finite"),
        ("sparsegpt", UP, 3e38, f"updates of {UP} overflow"),
        ("wanda", UP, torch.inf, f"{UP} holds weights that are not finite"),
        (
            "sparsegpt",
            NORM,
            torch.nan,
            "the inputs of model.layers.1.mlp.gate_proj.weight and .*up_proj.weight are not finite",
        ),
        ("wanda", "model.embed_tokens.weight", torch.inf, "the inputs of model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_what_is_not_finite_is_named(tiny_llama, tmp_path, refused, finishes, method, name, value, says):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    change_weights(lambda weights: weights[name].fill_(value))(folder)
    settings = (f"model={folder}", f"prune.method={method}")
    line = refused(tmp_path / "run", *settings)
    assert re.search(says, line), line
    shutil.copyfile(tiny_llama / "model.safetensors", folder / "model.safetensors")
    finishes(tmp_path / "run", *settings)


def test_a_model_that_overflows_in_half_precision_is_told_of_a_wider_one(tiny_llama, tmp_path, refused, finishes):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e4)
    model.save_pretrained(tmp_path / "model")
    for path in tiny_llama.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "model" / path.name)
    line = refused(tmp_path / "run", f"model={tmp_path}/model")
    assert "the inputs of model.layers.1.mlp.down_proj.weight are not finite: type dtype=bfloat16" in line
    finishes(tmp_path / "run", f"model={tmp_path}/model", "dtype=bfloat16")


@pytest.mark.parametrize("method", ["sparsegpt", "wanda_seq"])
def test_a_singular_hessian_is_damped_until_it_is_not(tiny_llama, tmp_path, finishes, method):
    few = ("calibration.samples=1", "calibration.seq_len=8", "prune.damp=0", f"prune.method={method}")
    _, said = finishes(tmp_path, f"model={tiny_llama}", *few)
    assert "model.layers.0.mlp.down_proj.weight: the Hessian is singular at damping 0: trying 0.0001" in said
    for name, weight in models.tensors(tmp_path / "prune/model"):
        assert weight.isfinite().all(), name


def test_too_short_a_text_and_what_is_said_to_type(tiny_llama, tmp_path, refused, finishes):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat .\n" * 20)
    settings = (f"model={tiny_llama}", f"calibration.dataset={text}")
    line = refused(tmp_path / "run", *settings)
    assert "8 samples of 32 are asked for" in line
    finishes(tmp_path / "run", *settings, re.search(r"type (calibration\.samples=\d+)", line)[1])
    text.write_text("the cat\n")
    assert "a longer text or a shorter calibration.seq_len is needed" in refused(tmp_path / "other", *settings)
    text.write_text("the cat sat on the mat .\n" * 200)
    finishes(tmp_path / "other", *settings)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.txt", "", "is empty"),
        ("text.jsonl", '{"text": "a', "cannot load .* JSON parse error"),
        ("text.json.gz", "text", "cannot load .* [Nn]ot a gzipped file"),
        ("text.parquet", "text", "cannot load .* Parquet file size"),
        ("text.jsonl", '{"text": 3}', "should hold text: its first row is 3"),
        ("text.jsonl", '{"text": null}', "holds no text"),
        ("text.jsonl", '{"title": "a"}', "no column 'text' or 'input_ids': it has title"),
        ("ids.jsonl", '{"input_ids": [0.5]}', "should hold token ids"),
    ],
)
def test_text_that_is_none(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        sources.documents(sources.source(str(tmp_path / name)))


def test_rows_without_text_are_passed_over(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert sources.documents(sources.source(str(tmp_path / "text.jsonl")))["text"] == ["a"]


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_of_another_vocabulary(tiny_llama, tmp_path, refused, token):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [token] * 256}))
    line = refused(tmp_path / "run", f"model={tiny_llama}", f"calibration.dataset={tmp_path}/ids.jsonl")
    assert f"holds token {token}, the model knows" in line


def test_fewer_batches_than_processes(tiny_llama, tmp_path):
    settings = (f"model={tiny_llama}", *SETTINGS, "calibration.samples=2", f"run_dir={tmp_path}")
    seen = espalier(*settings, processes=2, expect=None)
    said = [line for line in seen.splitlines() if line.startswith("espalier: ")]
    assert said == [
        "espalier: 1 batches of calibration samples cannot be shared by 2 processes: type calibration.samples=4 or more"
    ]
    assert not (tmp_path / "prune").exists()


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own; `disk("size=1m")` mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not permitted here")

    def change(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
        return folder

    yield change
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_at_any_moment(tiny_llama, whole_masks, tmp_path, disk, typed):
    """It grows by 16 KiB a try: the run goes on from layer to layer, and fails in one line until there is room for all."""
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/disk/run")
    unwritten = []
    for size in range(8, 800, 16):
        prune = disk(f"size={size}k") / "run/prune"
        code, _, lines = typed(*settings)
        assert prune.exists() == (code == 0)
        if code == 0:
            break
        assert code == 2 and len(lines) == 1
        unwritten.append(re.search(r"cannot write \S*/run/\.prune/(\S+): .*No space left on device", lines[0])[1])
    assert (prune / "masks.safetensors").read_bytes() == whole_masks
    shards = [name for name in dict.fromkeys(unwritten) if name.endswith(".safetensors")]
    assert len(shards) >= 3 and shards == sorted(shards, key=lambda name: re.findall(r"\d+", name)[:1])
    files = {path.name for path in prune.rglob("*")}
    assert {"stage.json", "layers.csv", "config.json", "tokenizer.json"} < files
    assert not [name for name in files if name.endswith(".part")]


def test_a_disk_that_cannot_be_written(tiny_llama, tmp_path, disk, refused, finishes):
    run_dir = disk("size=1m,ro") / "run"
    assert "Read-only file system" in refused(run_dir, f"model={tiny_llama}")
    disk("size=1m,rw")
    finishes(run_dir, f"model={tiny_llama}")


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_run_dir_that_is_a_file(tiny_llama, tmp_path, refused, finishes, below):
    file = tmp_path / "run"
    file.write_text("")
    run_dir = tmp_path / f"run{below}"
    assert re.search(
        f"cannot write {run_dir}/.prune/stage.json: .*Not a directory", refused(run_dir, f"model={tiny_llama}")
    )
    file.unlink()
    finishes(run_dir, f"model={tiny_llama}")


def test_a_full_disk_under_two_processes(tiny_llama, tmp_path, disk):
    """The first says so; the second, left alone in a sum over both, does not bury that in a traceback."""
    disk("size=100k")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "launch.py", f"model={tiny_llama}", *SETTINGS, f"run_dir={tmp_path}/disk/run"]
    both = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both["TORCHELASTIC_RUN_ID"] = "test"  # as torchrun would set; else Lightning's teardown removes WORLD_SIZE
    running = [
        subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment() | both | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2]
    assert "cannot write" in said[0] and "No space left on device" in said[0]
    assert "espalier: another process ended" in said[1]
    assert "Traceback" not in said[0] + said[1]
    assert not (tmp_path / "disk/run/prune").exists()


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", *SETTINGS, f"model={tmp_path}", f"run_dir={tmp_path}", "debug=true"])
    with pytest.raises(UserError, match="no config.json"):
        launch.main()
    assert os.listdir(tmp_path) == []

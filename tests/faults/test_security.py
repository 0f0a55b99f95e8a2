"""Files of others are not executed and read no other files, and secrets are written to no file."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.commands.main import main
from pipeline.compact.compact_model import load_compact
from pipeline.models import loading
from pipeline.runtime.errors import UserError, one_line
from pipeline.settings import reader
from tests.conftest import QUICK

OWN_CODE = """import torch
from transformers import LlamaConfig, LlamaForCausalLM

class Own(LlamaConfig):
    model_type = "own"

class OwnLM(LlamaForCausalLM):
    config_class = Own

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.arange(1.0, 9.0), persistent=False)
"""


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_not_executed(tiny_llama, tmp_path, refused, dump):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    dump(weights | {"more": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(tmp_path / "run", f"model={folder}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "below/other.safetensors", 3])
@pytest.mark.slow
def test_a_shard_outside_the_folder_is_refused(tiny_llama, tmp_path, refused, shard):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    shutil.move(folder / "model.safetensors", tmp_path / "other.safetensors")
    (folder / "one.safetensors").write_bytes(b"")
    index = {"weight_map": {name: shard for name in load_file(tmp_path / "other.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names the shard '{shard}', which is not a file in its folder" in refused(
        tmp_path / "run", f"model={folder}"
    )


def test_model_code_runs_only_with_trust_remote_code(tiny_llama, tmp_path, refused):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert "trust_remote_code" in refused(tmp_path / "run", f"model={folder}")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError):
        loading.load(folder, reader.load([f"model={folder}", "stages=[prune]", "trust_remote_code=true"]))
    assert (tmp_path / "ran").exists()


def test_the_commands_take_models_with_code(tiny_llama, tmp_path, typed, capsys):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnLM"]}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(OWN_CODE)
    masks, trust = run / "prune/masks.safetensors", "trust_remote_code=true"
    assert typed(f"model={model}", f"run_dir={run}", trust)[0] == 0
    for words in (
        ("verify", run / "prune/model", masks),
        ("apply", model, masks, tmp_path / "applied"),
        ("export", run / "prune/model", masks, tmp_path / "compact"),
        ("expand", tmp_path / "compact", tmp_path / "expanded"),
    ):
        asked = list(map(str, words))
        assert main(asked) == 2 and "trust_remote_code=true" in capsys.readouterr().err
        assert main([*asked, trust]) == 0
    recipe = reader.load([f"model={model}", "stages=[prune]", trust])
    for loaded in (loading.load(model, recipe), load_compact(tmp_path / "compact", recipe)):
        assert loaded.steps.tolist() == list(range(1, 9))  # transformers leaves such buffers uninitialised


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "${seed}", "${", "a${b"])
def test_a_recipe_cannot_read_the_environment(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    (tmp_path / "mine.yaml").write_text(f'model: "{value}"\n')
    for arguments in ([f"recipe={tmp_path}/mine.yaml"], [f"model={value}"], [f"prune.overrides={{a: '{value}'}}"]):
        with pytest.raises(UserError) as raised:
            reader.load(arguments)
        assert "abcdefghijkl" not in str(raised.value)


@pytest.mark.slow
def test_no_secret_is_written_or_printed(tiny_llama, tmp_path, typed, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_abcdefghijkl",
        "WANDB_API_KEY": "0123456789abcdef",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    code, output, lines = typed(*QUICK, f"model={tiny_llama}", f"run_dir={tmp_path}/runs/run")
    assert code == 0
    seen = (
        output
        + "".join(lines)
        + "".join(path.read_bytes().decode("latin1") for path in tmp_path.rglob("*") if path.is_file())
    )
    assert not [name for name, value in secrets.items() if value in seen]
    assert one_line("401 for https://user:hf_abcdefghijkl@host\nretry") == "401 for https://user:$HF_TOKEN@host retry"


@pytest.mark.slow
def test_the_report_notes_trusted_code_and_escapes_text(tiny_llama, tmp_path, typed):
    folder = tmp_path / "a<script>alert(1)<b>"
    shutil.copytree(tiny_llama, folder)
    assert typed(*QUICK, f"model={folder}", f"run_dir={tmp_path}/runs/run", "trust_remote_code=true")[0] == 0
    html = (tmp_path / "runs/run/report/report.html").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "trust_remote_code=true: the model's own code was run" in html

"""The files of a model: which are downloaded, found, copied and counted for its identity."""

import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.utils import filter_repo_objects

from pipeline.models import loading, model_files
from pipeline.models.rewrite import rewrite
from pipeline.settings.schema import Recipe


def test_download_patterns_of_hub_models():
    there = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "qwen.tiktoken",
        "additional_chat_templates/tools.jinja",
        "modeling_x.py",
    ]
    there += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    elsewhere = [
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
    ]
    elsewhere += [
        "original/params.json",
        "metal/model.bin",
        "README.md",
        "adapters/a/model.safetensors",
        "pytorch_model.bin",
    ]
    downloaded = filter_repo_objects([*there, *elsewhere], **model_files.download("*.safetensors"))
    assert list(downloaded) == there


@pytest.mark.parametrize("more", ["README.md", "model.fp16.safetensors", "tf_model.h5"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_downloaded_model_is_here_and_found_offline(tmp_path, monkeypatch, more, weights):
    """Its repository also holds files that `locate` does not download."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository, commit = tmp_path / "models--a--b", "0" * 40
    snapshot = repository / "snapshots" / commit
    for path, text in ((repository / "refs/main", commit), (snapshot / "config.json", "{}"), (snapshot / weights, "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if more.endswith(".safetensors"):
        (snapshot / more).write_text("")
    listing = {name: TreeCacheEntry(0, commit) for name in ("config.json", weights, more)}
    write_tree_cache(str(repository), commit, listing)
    assert loading.is_here("a/b", None)
    (snapshot / weights).rename(tmp_path / weights)
    assert not loading.is_here("a/b", None)
    (tmp_path / weights).rename(snapshot / weights)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert loading.locate("a/b", None) == snapshot


def test_all_other_files_are_copied(tiny_llama, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(tiny_llama, origin)
    (origin / "additional_chat_templates").mkdir()
    (origin / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (origin / "chat_template.jinja").write_text("{{ messages[0] }}")
    (origin / "cl100k_base.tiktoken").write_text("IQ== 0")  # the vocabulary of Phi-3-small and Qwen-7B
    rewrite(origin, tmp_path / "target", Recipe(), lambda name, weight: None)
    for path in origin.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (tmp_path / "target" / path.relative_to(origin)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "special_tokens_map.json"])
def test_the_identity_of_a_model_changes_with_what_it_reads_and_writes(tiny_llama, tmp_path, name):
    shutil.copytree(tiny_llama, tmp_path / "model")
    before = model_files.identity(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("another card")
    assert model_files.identity(tmp_path / "model") == before
    (tmp_path / "model" / name).write_text("{}")
    assert model_files.identity(tmp_path / "model") != before

"""Errors of all stages that can be foreseen are reported before the first stage, within seconds."""

import json
import shutil
import time
from pathlib import Path

import datasets
import pytest

from pipeline.data import sources, world
from pipeline.runtime import caches
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.stages import evaluate, finetune, keys, preflight, reconstruct
from tests.conftest import QUICK
from tests.data.test_chat import SHORT
from tests.faults import harm

WHOLE = ("stages=[prune,reconstruct,finetune,evaluate,report]", "reconstruct.accumulate=1")


def chats(folder: Path) -> Path:
    path = folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": SHORT}) + "\n")
    return path


# without the checks, each would fail in a late stage
LATE = {
    "finetune.dataset={here}/x.jsonl": "has no column 'text' or 'input_ids': it has body; set finetune.column",
    "finetune.dataset={here}/x.jsonl finetune.column=bodi": "has no column 'bodi': it has body",
    "evaluate.perplexity=[{here}/x.jsonl]": "set evaluate.column",
    "finetune.validation={here}/x.jsonl": "set finetune.column",
    "reconstruct.dataset={here}/x.jsonl": "set reconstruct.column",
    "finetune.dataset={here}/chat.jsonl": "holds conversations, but the model's tokenizer has no chat template",
    "finetune.dataset={here}/t.txt finetune.loss=assistant": "holds no conversations",
    "finetune.loss=assistant": "holds no conversations",
    "evaluate.perplexity=[{here}/t.txt]": "too few for one window of 64: set evaluate.seq_len=",
    "evaluate.perplexity=[{here}/null.jsonl]": "holds no text",
    "finetune.dataset={here}/broken.jsonl": "cannot load",
    "finetune.dataset=nobody/nothing": "cannot load nobody/nothing@train",
    "reconstruct.seq_len=4096": "set reconstruct.seq_len=128",
    "evaluate.seq_len=129": "set evaluate.seq_len=128",
    "reconstruct.dataset={here}/t.txt": "8 samples of 32 are needed: set a longer text or a shorter reconstruct.seq_len",
    "finetune.validation=world": "the generated world has no split 'validation': use world@train or world@test",
    "evaluate.prompts=['']": "'' has no token to continue from",
    "finetune.loggers=[wandb]": "run `pip install wandb`, or set finetune.loggers=[]",
}


@pytest.mark.parametrize("asked", LATE)
def test_late_errors_are_reported_before_the_first_stage(tiny_llama, tmp_path, refused, asked):
    if "wandb" in asked and shutil.which("wandb"):
        pytest.skip("wandb is here")
    chats(tmp_path)
    for name, content in {
        "x.jsonl": '{"body": "a"}',
        "t.txt": "the cat",
        "null.jsonl": '{"text": null}',
        "broken.jsonl": "{",
    }.items():
        (tmp_path / name).write_text(content)
    settings = [word.format(here=tmp_path) for word in asked.split()]
    if asked.startswith("evaluate.prompts"):
        settings = ["evaluate.prompts=['']", f"model={no_bos(tiny_llama, tmp_path)}"]
    line = refused(tmp_path / "run", *QUICK, *WHOLE, f"model={tiny_llama}", *settings)
    assert LATE[asked] in line


@pytest.mark.slow  # lm-eval reads the files of its tasks in four seconds
def test_an_unknown_task_is_reported_before_the_first_stage(tiny_llama, tmp_path, refused):
    asked = ("finetune.batch_size=3", "finetune.accumulate=1", "evaluate.tasks=[nothing]")
    assert "unknown task 'nothing'" in refused(tmp_path / "run", *QUICK, *WHOLE, f"model={tiny_llama}", *asked)


def test_without_perplexity_the_length_of_its_windows_does_not_count(tiny_llama):
    asked = (f"model={tiny_llama}", "evaluate.perplexity=[]", "evaluate.seq_len=129", "evaluate.tasks=[world_homes]")
    for check in (evaluate.check, preflight.check):
        check(reader.load([*QUICK, *asked]))


def no_bos(model: Path, folder: Path) -> Path:
    ours = world.tokenizer()
    ours.backend_tokenizer.post_processor = None
    shutil.copytree(model, folder / "model")
    ours.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_finished_stages_that_are_left_out_are_named(tiny_llama, tmp_path, typed):
    same = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", "evaluate.windows=1", "evaluate.continuations=0")
    assert "is not in stages" not in typed(*same, "stages=[prune,evaluate]")[1]
    code, output, _ = typed(*same, "stages=[evaluate]")
    assert (
        code == 0
        and f"{tmp_path}/run/prune is finished, but prune is not in stages: evaluate will not read it" in output
    )


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("pretrain.max_positions=64", "exceeds the model's 64 positions: set pretrain.seq_len=64"),
        ("calibration.seq_len=512", "set calibration.seq_len=256"),
        ("pretrain.hidden_size=130", "the sizes in the recipe's section pretrain do not fit together"),
    ],
)
def test_checks_know_the_model_of_a_pretrain_stage(tmp_path, typed, setting, says):
    code, _, (line,) = typed("recipe=tiny", "stages=[pretrain,prune]", f"run_dir={tmp_path}/run", setting)
    assert code == 2 and says in line
    assert not list((tmp_path / "run").glob("*pretrain*"))


def test_the_disk_must_have_room_for_all_stages(tiny_llama, tmp_path, refused, typed):
    try:
        harm.disk("size=600k")(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
    try:
        settings = [*QUICK, f"model={tiny_llama}", "finetune.method=full", f"run_dir={tmp_path}/disk/run"]
        assert "prune, finetune, evaluate, report need about" in refused(tmp_path / "disk/run", *settings)
        assert typed(*settings, "stages=[prune]")[0] == 0  # there is room for one stage alone
    finally:
        harm.undo(tmp_path)


@pytest.mark.slow
def test_all_checks_take_less_than_three_seconds(stories, hub, tmp_path):
    """1.5 s measured on a busy machine with two cores, of which lm-eval's import takes 1.1 s."""
    texts = ["calibration.dataset=local/stories", "finetune.dataset=local/stories", "evaluate.perplexity=[wikitext2]"]
    lengths = [f"{section}.seq_len=256" for section in ("calibration", "finetune", "evaluate")]
    more = ["stages=[prune,finetune,evaluate,report]", "evaluate.tasks=[arc_easy,openbookqa]", f"mirror={hub}"]
    recipe = reader.load([f"model={stories}", f"run_dir={tmp_path}/run", *texts, *lengths, *more])
    begun = time.process_time()
    keys.external_inputs(recipe)
    for check in (reconstruct.check, finetune.check, evaluate.check, preflight.check):
        check(recipe)
    assert time.process_time() - begun < 3


def test_only_the_beginning_of_a_large_text_is_read(tiny_llama, tmp_path):
    """There may be many rows, each as long as a book."""
    path = tmp_path / "books.jsonl"
    with open(path, "w") as file:
        for _ in range(200):
            file.write(json.dumps({"text": "the cat sat on the mat . " * 10_000}) + "\n")
    settings = [f"model={tiny_llama}", f"run_dir={tmp_path}/run", "stages=[evaluate]", "evaluate.seq_len=64"]
    recipe = reader.load([*settings, f"evaluate.perplexity=[{path}]", "evaluate.tasks=[]"])
    begun = time.process_time()
    preflight.check(recipe)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("where", ["closed", "full"])
def test_a_cache_that_cannot_be_written_names_the_variable(tiny_llama, tmp_path, monkeypatch, refused, where):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat .\n" * 200)
    if where == "closed":
        (tmp_path / "file").write_text("")
        cache = tmp_path / "file/cache"
    else:
        try:
            harm.disk("size=4k,nr_inodes=2")(tmp_path)
        except PermissionError as error:
            pytest.skip(str(error))
        cache = tmp_path / "disk/cache"
        cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    try:
        line = refused(tmp_path / "run", f"model={tiny_llama}", f"calibration.dataset={text}")
    finally:
        harm.undo(tmp_path)
    assert f"the cache of Hugging Face cannot be written in {cache}" in line
    assert "set HF_DATASETS_CACHE=FOLDER, or HF_HOME=FOLDER" in line and "text.txt" not in line


def test_a_cache_that_fills_up_names_the_variable(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat sat on the mat {i}\n" for i in range(50_000)))
    try:
        harm.disk("size=200k")(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "disk")
    try:
        with pytest.raises(UserError, match="set HF_DATASETS_CACHE=FOLDER"):
            sources.documents(sources.source(str(text)))
    finally:
        harm.undo(tmp_path)


def test_other_errors_are_not_blamed_on_the_cache(tmp_path):
    assert caches.problem(PermissionError(13, "no", str(tmp_path / "elsewhere"))) is None
    assert caches.problem(ValueError("a")) is None


def test_a_task_without_cached_data_is_refused_offline(tiny_llama, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = [*QUICK, f"model={tiny_llama}", "evaluate.tasks=[arc_easy,world_tools]"]
    line = refused(tmp_path / "run", *settings)
    assert "task 'arc_easy' reads allenai/ai2_arc, which is in no cache, and HF_HUB_OFFLINE is set" in line
    (tmp_path / "cache/allenai___ai2_arc").mkdir(parents=True)
    assert not caches.is_missing("allenai/ai2_arc") and caches.is_missing("allenai/other")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert not caches.is_missing("allenai/other")

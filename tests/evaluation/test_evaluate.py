"""The evaluate stage: results, cache, placement, errors."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig

import launch
from pipeline.data import world
from pipeline.evaluation import continuations
from pipeline.evaluation.measure import Subject
from pipeline.models import loading, model_files
from pipeline.runtime import checksums
from pipeline.runtime.errors import UserError
from pipeline.settings.reader import load
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks
from tests import families
from tests.conftest import QUICK, typing
from tests.evaluation.test_perplexity import tiny_llama as random_llama

SETTINGS = (*QUICK, "stages=[prune,evaluate]", "evaluate.tasks=[world_tools]", "evaluate.continuation_tokens=6")

pytestmark = pytest.mark.slow


@pytest.fixture
def typed(monkeypatch, capsys):
    return typing(SETTINGS, monkeypatch, capsys)


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "evaluate/results.json").read_text())


def cached_measurements(runs: Path) -> dict[Path, int]:
    """The files of the cache, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (runs / ".measured").iterdir()}


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch.py", *SETTINGS, f"model={tiny_llama}", f"run_dir={run_dir}"])
        assert launch.main() == 0
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the finished run with its cache."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs/one"


def test_where_no_cache_can_be_next_to_the_run_it_is_inside(tiny_llama, tmp_path, typed):
    (tmp_path / ".measured").write_text("nothing can be written here")
    code, _, lines = typed(f"model={tiny_llama}", f"run_dir={tmp_path}/run", "evaluate.windows=1", "evaluate.tasks=[]")
    assert code == 0, lines
    assert cached_measurements(tmp_path / "run")


def test_errors_differences_continuations_and_hashes(finished, tiny_llama):
    written = results(finished)
    dense, pruned = written["models"]["dense"], written["models"]["pruned"]
    assert dense["differences"] == {} and pruned["differences"].keys() == {"dense"}
    change = pruned["differences"]["dense"]
    log = change["perplexity"]["world"]
    assert log["log"] == pytest.approx(math.log(pruned["perplexity"]["world"] / dense["perplexity"]["world"]))
    assert 0 < log["stderr"] < 0.1 and 0 < dense["perplexity_stderr"]["world"] < dense["perplexity"]["world"]
    task, ours, theirs = "world_tools", pruned["zero_shot"], dense["zero_shot"]
    assert change["zero_shot"][task]["acc"] == pytest.approx(ours[task]["acc"] - theirs[task]["acc"])
    assert change["zero_shot"][task]["stderr"] <= ours[task]["acc_stderr"] + theirs[task]["acc_stderr"]
    assert len(written["protocol"]["prompts"]) == len(dense["continuations"]) == len(pruned["continuations"]) == 3
    texts = world.documents("test")
    assert all(any(text.startswith(prompt) for text in texts) for prompt in written["protocol"]["prompts"])
    assert (dense["hash"], pruned["hash"]) == (
        model_files.identity(tiny_llama),
        model_files.identity(finished / "prune/model"),
    )
    masks = (finished / "prune/masks.safetensors").read_bytes()
    assert written["protocol"]["masks"] == hashlib.sha256(masks).hexdigest()
    assert "sparsity" in dense and "mask_violations" not in dense and pruned["mask_violations"] == 0


@pytest.mark.parametrize("elsewhere", ["placement=stream", "placement=device_map", "batch_size=auto"])
def test_placement_does_not_change_results(finished, tiny_llama, tmp_path, typed, elsewhere):
    for stage in ("prune", "evaluate"):
        shutil.copytree(finished / stage, tmp_path / "run" / stage)
    code, output, lines = typed(f"model={tiny_llama}", f"run_dir={tmp_path}/run", f"evaluate.{elsewhere}")
    assert code == 0, lines
    assert "prune: done before" in output and "evaluate: running" not in output.split("running again")[0]
    assert results(tmp_path / "run") == results(finished)


def test_disk_offload_does_not_change_results(tiny_llama):
    """As accelerate does if GPU and host memory together are too small."""
    recipe = Recipe(model=str(tiny_llama))
    ids = torch.arange(24)[None]
    spilled = loading.load(tiny_llama, recipe, device_map="auto", max_memory={"cpu": 60_000})
    assert "disk" in spilled.hf_device_map.values()
    assert torch.equal(spilled(ids).logits, loading.load(tiny_llama, recipe)(ids).logits)


def test_a_new_task_and_a_new_run_reuse_the_cache(run_dir, tiny_llama, typed):
    before = cached_measurements(run_dir.parent)
    assert len(before) == 2 * 3  # a text, a task and the continuations, of two models
    model = f"model={tiny_llama}"
    assert typed(model, f"run_dir={run_dir}", "evaluate.tasks=[world_tools,world_homes]")[0] == 0
    after = cached_measurements(run_dir.parent)
    assert before.items() <= after.items() and len(after) == 8
    assert typed(model, f"run_dir={run_dir.parent}/two", "prune.sparsity=0.3")[0] == 0
    last = cached_measurements(run_dir.parent)
    assert (
        after.items() <= last.items() and len(last) == 8 + 3
    )  # of the new pruned model; those of the dense one are shared
    assert results(run_dir.parent / "two")["models"]["dense"] == results(run_dir)["models"]["dense"] | {
        "zero_shot": results(run_dir.parent / "two")["models"]["dense"]["zero_shot"],
        "zero_shot_mean": results(run_dir.parent / "two")["models"]["dense"]["zero_shot_mean"],
    }


def test_measurements_before_an_error_are_kept(tiny_llama, tmp_path, typed):
    """The text's first rows are valid, so the checks before the run pass, and later ones are not."""
    text = tmp_path / "ids.jsonl"
    rows = [json.dumps({"input_ids": [5, 6, 7, 8] * 20})] * 9
    text.write_text("\n".join([*rows, json.dumps({"input_ids": [10**6] * 64})]))
    settings = (f"model={tiny_llama}", "stages=[evaluate]", f"run_dir={tmp_path}/runs/one")
    settings += (f"evaluate.perplexity=[world,{text}]",)
    code, _, (line,) = typed(*settings)
    assert code == 2 and "holds token 1000000, but the model knows" in line
    before = cached_measurements(tmp_path / "runs")
    assert len(before) == 1 and not (tmp_path / "runs/one/evaluate").exists()
    text.write_text("\n".join(rows))
    assert typed(*settings)[0] == 0
    assert before.items() <= cached_measurements(tmp_path / "runs").items()


def test_bad_settings_are_refused_before_any_work(tiny_llama, tmp_path, typed):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*token*"))
    run_dir = tmp_path / "runs/one"
    settings = (f"model={tiny_llama}", f"run_dir={run_dir}")
    for more, says in [
        (["evaluate.seq_len=129"], "evaluate.seq_len=129 exceeds the model's 128 positions: set evaluate.seq_len=128"),
        ([f"mirror={tmp_path}", "evaluate.tasks=[boolq]"], f"no {tmp_path}/aps/super_glue/boolq/validation-*.parquet"),
        (["evaluate.batch_size=many"], "evaluate.batch_size=many is neither a number nor auto"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0 is out of range"),
        (["stages=[evaluate]", f"model={bare}"], f"{bare} has no usable tokenizer"),
    ]:
        code, _, lines = typed(*settings, *more)
        assert code == 2 and len(lines) == 1 and says in lines[0], lines
        assert not run_dir.exists() or not any(run_dir.glob("[!.]*"))


def test_a_violation_fails_the_run(run_dir, tiny_llama, typed):
    path = run_dir / "prune/masks.safetensors"
    masks, name = Masks(), "model.layers.0.mlp.up_proj.weight"
    masks.packed |= Masks.load(path).packed
    mask = masks[name]
    kept_one = tuple(mask.nonzero()[0].tolist())
    mask[kept_one] = False
    masks.add(name, mask, "2of4")
    masks.save(path)
    checksums.record(run_dir / "prune", path)  # otherwise the damage is noticed and the stage runs again
    code, _, (line,) = typed(f"model={tiny_llama}", f"run_dir={run_dir}", "evaluate.continuation_tokens=5")
    assert code == 2 and f"1 pruned weights of {name} are not zero, the first at {list(kept_one)}" in line


def test_prompts_are_beginnings_of_long_texts_that_fit():
    rows = Dataset.from_dict({"text": ["", "= Title =", "one two " * 40, "x " * 60, "short text of six words here"]})
    tokenizer = world.tokenizer()
    assert continuations.prompts(rows, tokenizer, 2, 100) == ["=", "one two " * 11 + "one two"]
    for prompt in continuations.prompts(rows, tokenizer, 5, 7):
        assert len(tokenizer(prompt).input_ids) <= 7
    ids = Dataset.from_dict({"input_ids": tokenizer(world.documents("test")[:3]).input_ids})
    assert [p.split()[0] for p in continuations.prompts(ids, tokenizer, 1, 50)] == [
        tokenizer.decode(ids[0]["input_ids"], skip_special_tokens=True).split()[0]
    ]


def test_continuations_are_greedy():
    tokenizer = world.tokenizer()
    model = random_llama(len(tokenizer)).eval()
    model.generation_config = GenerationConfig(repetition_penalty=9.0, num_beams=3, stop_strings=["."], do_sample=True)
    prompts = [text[:40] for text in world.documents("test")[:2]]
    generated = continuations.continuations(model, tokenizer, prompts, 5)
    for prompt, continuation in zip(prompts, generated, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = len(tokenizer.decode(ids[0], skip_special_tokens=True))
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert tokenizer.decode(ids[0], skip_special_tokens=True)[start:] == continuation
    model.config.max_position_embeddings = 4
    with pytest.raises(UserError, match="fills the model's 4 positions"):
        continuations.continuations(model, tokenizer, prompts, 5)


def test_a_model_that_cannot_generate_is_measured(tmp_path, typed):
    """The caches of transformers fail on some families; the stage ended there as if by a bug, after an hour of measuring."""
    families.save("blt", tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in families.text(8, 48).tolist()))
    settings = (f"model={tmp_path}/model", f"run_dir={tmp_path}/runs/one", "stages=[evaluate]", "evaluate.tasks=[]")
    code, output, lines = typed(*settings, f"evaluate.perplexity=[{text}]", "evaluate.seq_len=32", "evaluate.windows=2")
    assert code == 0, lines
    assert "no continuations: generate of BltForCausalLM fails ('BltConfig' object has no attribute" in output
    written = results(tmp_path / "runs/one")
    assert written["protocol"]["notes"][-1].startswith("no continuations")
    assert written["models"]["dense"]["continuations"] == []
    cached = [json.loads(path.read_text())["about"] for path in cached_measurements(tmp_path / "runs")]
    assert not any("prompts" in about for about in cached)  # it is tried again, perhaps with another transformers


def test_own_prompts_and_no_prompts(tiny_llama, tmp_path, typed):
    settings = ("stages=[evaluate]", f"model={tiny_llama}", "evaluate.tasks=[]", f"run_dir={tmp_path}/runs/one")
    settings += ("evaluate.perplexity=[]", "evaluate.prompts=['Where does Ivy live?']")
    assert typed(*settings)[0] == 0
    written = results(tmp_path / "runs/one")
    assert (
        written["protocol"]["prompts"] == ["Where does Ivy live?"]
        and len(written["models"]["dense"]["continuations"]) == 1
    )
    assert typed(*settings, "evaluate.continuations=0")[0] == 0
    written = results(tmp_path / "runs/one")
    assert written["protocol"]["prompts"] == [] and "continuations" not in written["models"]["dense"]


def test_the_batch_size_is_a_number_or_auto():
    assert load(["evaluate.batch_size=4"]).evaluate.batch_size == 4
    assert load(["evaluate.batch_size=auto"]).evaluate.batch_size == "auto"


def test_an_adapter_kept_apart_is_evaluated_on_the_pruned_model(run_dir, tiny_llama, typed):
    settings = (f"model={tiny_llama}", f"run_dir={run_dir}", "stages=[prune,finetune,evaluate]")
    before, by_placement = cached_measurements(run_dir.parent), {}
    for placed in ("whole", "stream"):
        more = ("finetune.method=plain_lora", "evaluate.tasks=[]", f"evaluate.placement={placed}")
        code, _, lines = typed(*settings, *more)
        assert code == 0, lines
        by_placement[placed] = results(run_dir)
        for path in cached_measurements(run_dir.parent).keys() - before.keys():
            path.unlink()
    assert by_placement["whole"] == by_placement["stream"]
    model, pruned = (by_placement["whole"]["models"][name] for name in ("finetuned", "pruned"))
    assert model["perplexity"]["world"] < 0.99 * pruned["perplexity"]["world"] and model["hash"] != pruned["hash"]
    assert model["differences"].keys() == {"dense", "pruned"}
    assert "mask_violations" not in model and "sparsity" not in model
    assert any("finetuned: a dense LoRA" in note for note in by_placement["whole"]["protocol"]["notes"])


def test_limited_windows_are_marked_and_are_the_first(finished, tiny_llama, run_dir, typed):
    whole = results(finished)
    (text,) = whole["protocol"]["datasets"].values()
    code, output, lines = typed(
        f"model={tiny_llama}", f"run_dir={run_dir}", "evaluate.windows=4", "stages=[prune,evaluate,report]"
    )
    assert code == 0, lines
    assert "world (first 4 windows)" in output
    written = results(run_dir)
    assert (
        written["protocol"]["windows"] == 4
        and "the first 4 windows of 64 tokens" in written["protocol"]["datasets"]["world"]
    )
    assert "windows of each text" in (run_dir / "report/report.md").read_text()
    assert written["models"]["dense"]["perplexity"] != whole["models"]["dense"]["perplexity"]
    assert "first" not in text and whole["protocol"]["windows"] is None


def test_windows_begin_with_bos_if_set_and_a_note_says_if_not(finished, tiny_llama, run_dir, typed):
    assert any("evaluate.bos=true" in note for note in results(finished)["protocol"]["notes"])
    before = len(cached_measurements(run_dir.parent))
    code, _, lines = typed(f"model={tiny_llama}", f"run_dir={run_dir}", "evaluate.bos=true")
    assert code == 0, lines
    written = results(run_dir)
    assert written["protocol"]["bos"] and not any("evaluate.bos" in note for note in written["protocol"]["notes"])
    assert written["models"]["dense"]["perplexity"] != results(finished)["models"]["dense"]["perplexity"]
    assert (
        len(cached_measurements(run_dir.parent)) == before + 2
    )  # only the perplexity of both models was measured again


def test_the_column_chooses_the_text(tiny_llama, tmp_path, typed):
    rows = {"text": ["the cat sat on the mat ."] * 40, "other": ["the dove sings to the mason ."] * 40}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    values = []
    for column in ("text", "other"):
        settings = [
            f"model={tiny_llama}",
            f"run_dir={tmp_path}/runs/run",
            "stages=[evaluate]",
            f"evaluate.column={column}",
        ]
        code, _, lines = typed(*settings, f"evaluate.perplexity=[{tmp_path}/rows.parquet]", "evaluate.tasks=[]")
        assert code == 0, lines
        (value,) = results(tmp_path / "runs/run")["models"]["dense"]["perplexity"].values()
        values.append(value)
    assert values[0] != values[1]


def test_an_adapter_is_read_on_the_host(tiny_llama, tmp_path, monkeypatch):
    """Left to itself peft reads it to "cuda", and each process opens a context on the first GPU."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    devices, read = [], peft.peft_model.load_peft_weights
    monkeypatch.setattr(peft.peft_model, "infer_device", lambda: "cuda")
    monkeypatch.setattr(
        peft.peft_model, "load_peft_weights", lambda *a, **given: devices.append(given["device"]) or read(*a, **given)
    )
    Subject("pruned", tiny_llama, tmp_path).load(load([*QUICK, f"model={tiny_llama}"]))
    assert devices == ["cpu"]

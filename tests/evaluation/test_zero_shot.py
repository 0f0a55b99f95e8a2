"""Zero-shot scores equal lm-eval's own, from a mirror, on any number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from datasets import Dataset
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.data import world
from pipeline.evaluation import task_identity, tasks
from pipeline.evaluation.tasks import check_tasks, load_tasks
from pipeline.evaluation.zero_shot import _language_model, zero_shot
from pipeline.models import placement
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Evaluate
from tests.conftest import SHARED, byte_tokenizer
from tests.evaluation import test_perplexity

HUB, STORIES = SHARED / "data" / "hub", SHARED / "models" / "stories260k"
with_shared = pytest.mark.skipif(not (HUB.is_dir() and STORIES.is_dir()), reason="needs ../shared")
METRICS = {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}

pytestmark = pytest.mark.slow  # lm-eval reads the files of its tasks in four seconds


def tiny_llama(vocabulary: int = 257) -> LlamaForCausalLM:
    return test_perplexity.tiny_llama(vocabulary).eval()


def arc_rows(count: int, salt: str) -> list[dict]:
    """Questions in ARC's format, with choices of different lengths."""
    words = ["ant", "bumblebee", "cat", "dragonfly", "elephant", "fox", "giraffe"]
    rows = []
    for i in range(count):
        texts = [f"a{'n old' * (j % 2)} {words[(3 * i + j) % 7]}" for j in range(3 + i % 2)]
        labels = list("ABCD")[: len(texts)]
        question = f"What is number {i} of {salt}?"
        choices = {"text": texts, "label": labels}
        rows.append({"question": question, "choices": choices, "answerKey": labels[i * 7 % len(labels)]})
    return rows


def write(mirror: Path, dataset: str, config: str, split: str, rows: list[dict]) -> None:
    folder = mirror / dataset / config
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


# rows for the other default tasks: they cover all ways in which lm-eval's definitions load and transform data
OTHER_ROWS = {
    "aps/super_glue boolq validation": {"question": "is ice hot", "passage": "Ice is cold.", "label": 0},
    "nyu-mll/glue rte validation": {"sentence1": "Cats sleep.", "sentence2": "Cats rest.", "label": 1},
    "Rowan/hellaswag default validation": {
        "activity_label": "Baking",
        "ctx_a": "We bake.",
        "ctx_b": "he",
        "endings": ["eats.", "sings."],
        "label": "1",
    },
    "allenai/winogrande winogrande_xl validation": {
        "sentence": "The box holds a cup so _ is hidden.",
        "option1": "the box",
        "option2": "the cup",
        "answer": "2",
    },
    "allenai/openbookqa main test": {
        "question_stem": "Ice is",
        "choices": {"text": ["cold", "a dog"], "label": ["A", "B"]},
        "answerKey": "A",
    },
}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("mirror")
    for config, salt in [("ARC-Easy", "the row"), ("ARC-Challenge", "all")]:
        write(folder, "allenai/ai2_arc", config, "test", arc_rows(11, salt))
        write(folder, "allenai/ai2_arc", config, "train", arc_rows(20, "the training"))
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory):
    """Keeps the temporary data out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def test_equals_a_plain_loop(mirror):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    correct, correct_by_length = [], []
    for row in arc_rows(11, "the row"):
        context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        scores = []
        for text in row["choices"]["text"]:
            answer = tokenizer(" " + text).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
        target = row["choices"]["label"].index(row["answerKey"])
        by_length = [score / len(text) for score, text in zip(scores, row["choices"]["text"])]
        correct.append(float(scores.index(max(scores)) == target))
        correct_by_length.append(float(by_length.index(max(by_length)) == target))
    scores, by_question = zero_shot(model, tokenizer, ["arc_easy"], mirror, batch_size=3)
    arc_easy = scores["arc_easy"]
    assert arc_easy.keys() == METRICS
    assert by_question["arc_easy"] == correct
    assert arc_easy["acc"] == pytest.approx(sum(correct) / 11)
    assert arc_easy["acc_norm"] == pytest.approx(sum(correct_by_length) / 11)
    assert arc_easy["acc_stderr"] == pytest.approx(torch.tensor(correct).std().item() / 11**0.5)


def test_log_likelihoods_are_not_rounded_to_the_models_dtype():
    """In bfloat16 the sum of a long answer would be a multiple of 1 or 2, and many answers would tie."""
    model, tokenizer, answer = tiny_llama().bfloat16(), byte_tokenizer(), " is rounded" * 5
    request = Instance("loglikelihood", {}, ("What", answer), 0, metadata=("task", 0, 1))
    lm = _language_model(model, tokenizer, 1, 0, 1, lambda text: None, (0, 1))
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([tokenizer("What" + answer).input_ids])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, 3:].float()
    assert found == pytest.approx(logits.log_softmax(-1)[range(len(answer)), ids[0, 4:]].sum().item(), abs=1e-3)


def test_scores_do_not_depend_on_the_other_tasks(mirror):
    arguments = (tiny_llama(), byte_tokenizer())
    both, correct = zero_shot(*arguments, ["arc_easy", "arc_challenge", "arc_easy"], mirror, fewshot=1)
    assert list(both) == list(correct) == ["arc_easy", "arc_challenge"]
    alone = zero_shot(*arguments, ["arc_challenge"], mirror, fewshot=1)
    assert (both["arc_challenge"], correct["arc_challenge"]) == tuple(found["arc_challenge"] for found in alone)


def test_a_mirror_may_have_any_name(tmp_path):
    folder = tmp_path / "a [0-9], *@ü"
    write(folder, "allenai/ai2_arc", "ARC-Easy", "test", arc_rows(3, "all"))
    assert len(load_tasks(["arc_easy"], str(folder))["tasks"]["arc_easy"].eval_docs) == 3
    task_identity.identity("arc_easy", str(folder))


def test_examples_come_from_the_training_split(mirror):
    for fewshot in (0, 2):
        task = load_tasks(["arc_easy"], mirror, fewshot)["tasks"]["arc_easy"]
        task.build_all_requests(limit=1)
        prompt = task.instances[0].args[0]
        assert (prompt.count("the training?"), prompt.count("the row?")) == (fewshot, 1)


def test_the_default_tasks_run_from_a_mirror(mirror, tmp_path):
    for place, row in OTHER_ROWS.items():
        write(tmp_path, *place.split(), [row] * 3)
    (tmp_path / "allenai" / "ai2_arc").symlink_to(Path(mirror, "allenai", "ai2_arc"))
    names = Evaluate().tasks
    scores_by_task, _ = zero_shot(tiny_llama(), byte_tokenizer(), names, str(tmp_path))
    assert list(scores_by_task) == names
    for scores in scores_by_task.values():
        assert scores.keys() in (METRICS, {"acc", "acc_stderr"})
        assert all(0 <= score <= 1 for score in scores.values())


def test_the_tasks_of_the_world_are_known_by_name():
    check_tasks(list(world.TASKS), mirror="no/such/folder")
    scores_by_task, _ = zero_shot(tiny_llama(len(world.tokenizer())), world.tokenizer(), list(world.TASKS), limit=8)
    assert scores_by_task.keys() == world.TASKS.keys()
    assert all(scores.keys() == METRICS for scores in scores_by_task.values())


def _run(rank: int, world_size: int, folder: str, cases: list[tuple]) -> None:
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = [list(zero_shot(*_loaded(case), rank=rank, world_size=world_size)) for case in cases]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _loaded(case: tuple) -> tuple:
    path, *rest = case
    if path is None:
        return tiny_llama(), byte_tokenizer(), *rest
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), *rest


def test_two_processes_compute_the_same(mirror, tmp_path):
    """Also with few-shot examples, and with fewer questions than processes."""
    cases = [(None, ["arc_easy"], mirror, 3, None, 2), (None, ["arc_challenge"], mirror, 3, 1, 0)]
    if STORIES.is_dir() and HUB.is_dir():
        cases.append((str(STORIES), ["arc_easy", "openbookqa"], str(HUB), 8, 25, 0))
    mp.spawn(_run, (2, str(tmp_path), cases), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == [list(zero_shot(*_loaded(case))) for case in cases]


def _run_with_an_idle_rank(rank: int, folder: str, case: tuple) -> None:
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, *rest = _loaded(case)
    if rank == 1:
        model = model.to("meta")
    share = (placement.IDLE if rank else 0, 1)
    results = zero_shot(model, *rest, rank=rank, world_size=2, share=share)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_a_process_without_a_model_returns_the_same(mirror, tmp_path):
    case = (None, ["arc_easy"], mirror, 3, None, 2)
    mp.spawn(_run_with_an_idle_rank, (str(tmp_path), case), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == list(zero_shot(*_loaded(case)))


@with_shared
def test_equals_lm_evals_command_line(tmp_path):
    names, limit = ["arc_easy", "arc_challenge", "openbookqa"], 30
    for name in names:
        packaged = tasks._definitions()[name]
        config = tasks._index(packaged.parent)[name].cfg
        files = sorted(map(str, (HUB / config["dataset_path"] / config["dataset_name"]).glob("test-*.parquet")))
        changes = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": files}}}
        own = {"include": str(packaged), "task": f"local_{name}", "training_split": None, "validation_split": None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own | changes))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={STORIES},dtype=float32", "--limit", str(limit)]
    command += ["--output_path", str(tmp_path), "--tasks", ",".join(str(tmp_path / f"{name}.yaml") for name in names)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    expected = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    scores, _ = zero_shot(*_loaded((str(STORIES),)), names, str(HUB), batch_size=8, limit=limit)
    assert scores.keys() == set(names)
    for name in names:
        assert scores[name].keys() == METRICS
        assert scores[name] == pytest.approx(
            {metric: expected[f"local_{name}"][f"{metric},none"] for metric in METRICS}
        )


def test_the_fast_task_search_equals_lm_evals_index():
    index = {name: entry.yaml_path for name, entry in tasks._index().items() if entry.yaml_path}
    definitions = tasks._definitions()
    assert {name: definitions.get(name) for name in index} == index


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown task 'arc_esy': did you mean arc_easy"):
        check_tasks(["openbookqa", "arc_esy"])
    with pytest.raises(UserError, match="no task at"):
        check_tasks(["./no_such_folder"])


def test_known_names_are_accepted_without_a_mirror():
    check_tasks([*Evaluate().tasks, "mmlu", "ai2_arc"])


@pytest.mark.parametrize(
    ("name", "fewshot", "file"),
    [
        ("boolq", 0, "aps/super_glue/boolq/validation-*.parquet"),
        ("rte", 0, "nyu-mll/glue/rte/validation-*.parquet"),
        ("winogrande", 0, "allenai/winogrande/winogrande_xl/validation-*.parquet"),
        ("hellaswag", 0, "Rowan/hellaswag/default/validation-*.parquet"),
        ("openbookqa", 0, "allenai/openbookqa/main/test-*.parquet"),
        ("mmlu", 0, "cais/mmlu/abstract_algebra/test-*.parquet"),
    ],
)
def test_missing_data_names_its_file(mirror, name, fewshot, file):
    with pytest.raises(UserError) as refusal:
        check_tasks(["arc_easy", name], mirror, fewshot)
    assert f"{mirror}/{file}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_fewshot_examples_need_their_split(tmp_path):
    write(tmp_path, "allenai/ai2_arc", "ARC-Easy", "test", arc_rows(3, "all"))
    check_tasks(["arc_easy"], str(tmp_path))
    with pytest.raises(UserError, match="ARC-Easy/train-"):
        check_tasks(["arc_easy"], str(tmp_path), fewshot=1)


@pytest.mark.parametrize("name", ["squadv2", "flan_held_in", "humaneval"])
def test_tasks_that_a_mirror_cannot_serve_are_refused(mirror, name):
    with pytest.raises(UserError, match=f"'{name}'"):
        check_tasks([name], mirror)


def test_a_task_that_cannot_be_loaded_is_a_one_line_error(tmp_path):
    broken = {"include": str(tasks._definitions()["arc_easy"]), "task": "mine", "dataset_path": "parquet"}
    broken |= {"dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.parquet")}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(UserError, match="cannot load .*mine.yaml of lm-eval, or its data: .*none.parquet") as refusal:
        load_tasks([str(tmp_path / "mine.yaml")])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", ["default", "anything"])
def test_a_task_without_a_configuration_uses_the_default_or_only_one(tmp_path, config):
    """Also user task files: a single one, a folder, and a group with an aggregate."""
    write(tmp_path, "us/quiz", config, "test", arc_rows(5, "all"))
    if config == "default":
        write(tmp_path, "us/quiz", "another", "test", arc_rows(9, "others"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    base = {"include": str(tasks._definitions()["arc_easy"]), "dataset_path": "us/quiz", "dataset_name": None}
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | {"task": name}))
    group = {"group": "pair", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "pair.yaml").write_text(yaml.safe_dump(group))
    model, tokenizer = tiny_llama(), byte_tokenizer()
    scores, _ = zero_shot(model, tokenizer, [str(folder)], str(tmp_path))
    assert scores.keys() == {"one", "two"}
    assert scores["one"] == zero_shot(model, tokenizer, [str(folder / "one.yaml")], str(tmp_path))[0]["one"]
    assert len(load_tasks([str(folder / "one.yaml")], str(tmp_path))["tasks"]["one"].eval_docs) == 5
    pair, correct = zero_shot(model, tokenizer, [str(folder / "pair.yaml")], str(tmp_path))
    assert not correct  # groups have no single answers
    assert pair.keys() == {"pair"} and pair["pair"]["acc"] == pytest.approx(scores["one"]["acc"])
    asked = task_identity.identity(str(folder / "one.yaml"), str(tmp_path))
    write(tmp_path, "us/quiz", config, "test", arc_rows(6, "all"))
    assert task_identity.identity(str(folder / "one.yaml"), str(tmp_path)) != asked


def test_the_identity_of_an_own_task_changes_with_all_that_it_reads(tmp_path):
    """The file that it includes, its Python code and its data. A moved folder is the same task."""
    files = {
        "base.txt": "output_type: multiple_choice\ndoc_to_text: !function prompts.text\ndoc_to_choice: choices\n",
        "prompts.py": "def text(doc):\n    return doc['question']\n",
        "questions.jsonl": json.dumps({"question": "Who?", "choices": [" I", " you"], "label": 0}) + "\n",
    }
    task = {"task": "mine", "include": "base.txt", "doc_to_target": "label", "test_split": "test"}
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}}
        (folder / "mine.yaml").write_text(yaml.safe_dump(task | data))
        for name, text in files.items():
            (folder / name).write_text(text)
    asked = task_identity.identity(str(folders[0] / "mine.yaml"))
    assert task_identity.identity(str(folders[1] / "mine.yaml")) == asked
    for name, text in files.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folders[0])  # where the data are looked for
            before = task_identity.identity("./mine.yaml")
            Path(name).write_text(
                text + {"base.txt": "target_delimiter: ''\n", "prompts.py": "x = 1\n"}.get(name, text)
            )
            assert task_identity.identity("./mine.yaml") != before, name


def test_a_task_file_is_found_in_a_folder_that_was_read_before(tmp_path):
    base = {"include": str(tasks._definitions()["arc_easy"])}
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(base | {"task": name}))
        check_tasks([str(tmp_path / f"{name}.yaml")])


def test_more_examples_than_there_are_is_a_one_line_error():
    with pytest.raises(UserError, match="evaluate.fewshot=5000 is more than the examples of world_homes: set fewer"):
        zero_shot(tiny_llama(len(world.tokenizer())), world.tokenizer(), ["world_homes"], limit=1, fewshot=5000)

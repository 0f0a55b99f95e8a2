"""The stages export and speed, their part of the report, and the command `speed`."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.api import load_compact
from pipeline.commands import compare
from pipeline.commands.main import main
from pipeline.compact import kernels
from pipeline.models import loading
from pipeline.reporting import costs
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe, Speed
from pipeline.speed import measure, worker
from pipeline.speed.process import MeasurementError, start_processes
from pipeline.stages import space
from tests import families, launches
from tests.conftest import QUICK, typing

STAGES = ("prune", "reconstruct", "export", "evaluate", "speed", "report")
SETTINGS = (
    *QUICK,
    f"stages=[{','.join(STAGES)}]",
    "reconstruct.accumulate=1",
    "reconstruct.epochs=1",
    "evaluate.continuations=0",
    "speed.repeats=2",
    "speed.prompt_lengths=[16,500]",
    "speed.new_tokens=200",
    "speed.batches=[2,1]",
    "speed.threads=1",
)


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run by the command, and its output."""
    folder = tmp_path_factory.mktemp("speed") / "run"
    return folder, launches.run((*SETTINGS, f"model={tiny_llama}", f"run_dir={folder}"), folder.parent / "log")


@pytest.fixture
def repeat(run, tmp_path, tiny_llama, monkeypatch, capsys):
    """A copy of the run, and a function that runs its command again in this process."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    settings = (*SETTINGS, f"model={tiny_llama}", f"run_dir={folder}")
    return folder, typing(settings, monkeypatch, capsys)


@pytest.mark.slow
@torch.no_grad()
def test_the_compact_folder_is_the_last_model(run):
    folder, _ = run
    ordinary = loading.load(folder / "reconstruct/model", Recipe())
    compact, ids = load_compact(folder / "export/compact"), torch.arange(3, 20).view(1, -1)
    torch.testing.assert_close(compact(input_ids=ids).logits, ordinary(input_ids=ids).logits)
    sizes = json.loads((folder / "export/sizes.json").read_text())
    assert sizes["matrices"] == 21 and costs.size_ratio(sizes) < 1
    packed = sizes["matrix_bytes"]
    assert packed["compact"] / packed["ordinary"] == pytest.approx(1 / 2 + 1 / 32)
    inputs = {stage: folder / stage for stage in ("prune", "reconstruct")}
    written = sum(path.stat().st_size for path in (folder / "export").rglob("*") if path.is_file())
    assert 0 < space.estimate("export", Recipe(), inputs, folder / ".export")[1] - written < 2 * space.SMALL
    card = (folder / "export/compact/README.md").read_text()
    assert "espalier.load_compact" in card and "layers reconstructed" in card
    assert "`espalier export` writes a" in (folder / "prune/model/README.md").read_text()


@pytest.mark.slow
def test_the_results_of_the_speed_stage(run):
    results = json.loads((run[0] / "speed/results.json").read_text())
    assert list(results["models"]) == ["ordinary", "compact"]
    for name, model in results["models"].items():
        assert model["format"] == name and model["dtype"] == "float32"
        assert all(model[key] > 0 for key in ("file_bytes", "memory_bytes", "load_seconds"))
        assert model["first_token_seconds"] >= model["load_seconds"]
        assert list(model["prefill"]) == ["16", "128"] and list(model["decode"]) == ["1", "2"]
        for rates in (*model["prefill"].values(), *model["decode"].values()):
            assert len(rates["all"]) == 2 and 0 < rates["least"] <= rates["median"] <= rates["most"]
    products = {(row["shape"], row["tokens"]): row for row in results["products"]}
    assert {tokens for _, tokens in products} == {1, 4, 16}
    product = products["48 x 32", 4]
    assert product["matrices"] == 6 and product["microseconds"].keys() == results["models"].keys()
    assert results["settings"] == {"repeats": 2, "prompt": 16, "new_tokens": 112, "threads": 1, "compiled": False}
    assert "prompts are cut to the model's 128 positions" in results["notes"]
    assert "112 tokens are generated, not 200: the model has 128 positions" in results["notes"]
    assert results["same_tokens"] == {"compact": 1.0}
    machine = results["machine"]
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__ and "cores" in machine["hardware"]
    assert set(machine["flags"]) <= kernels.cpu_flags()


@pytest.mark.slow
def test_the_report_and_the_terminal_show_the_results(run):
    folder, output = run
    sizes, speed = (json.loads((folder / name).read_text()) for name in ("export/sizes.json", "speed/results.json"))
    assert "Size and speed" in output and "decode, batch 1, tokens/s" in output
    page, text = ((folder / "report" / name).read_text() for name in ("report.html", "report.md"))
    for report in (page, text):
        assert costs.headline(sizes, speed) in report
        for label in ("pruned matrices, MiB", "memory, MiB", "prefill of 128, tokens/s", "decode, batch 2, tokens/s"):
            assert label in report
        assert "Prompts are cut to the model's 128 positions." in report
        assert "export/compact" in report and "Products by shape of the matrix" in report
    assert "The compact model against the ordinary one" in page


@pytest.mark.slow
def test_finished_stages_keep_their_figures_and_an_incomplete_export_is_repeated(repeat, run):
    folder, command = repeat
    code, output, _ = command()
    assert code == 0 and output.count("done before") == len(STAGES)
    measured = (folder / "speed/results.json").read_bytes()
    shutil.copytree(folder / "export/compact", folder / ".export/.compact.part/more")  # as after kill -9
    code, output, lines = command("rerun=export")
    assert code == 0, lines
    assert output.count("done before") == len(STAGES) - 1 and not list(folder.rglob(".*part"))
    for path in (run[0] / "export/compact").iterdir():
        assert (folder / "export/compact" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (folder / "speed/results.json").read_bytes() == measured


@pytest.mark.slow
def test_an_export_error_is_one_line(repeat, monkeypatch):
    _, command = repeat
    monkeypatch.setattr("pipeline.compact.file_format.DTYPES", {})
    code, _, lines = command("rerun=export")
    assert code == 2 and len(lines) == 1
    assert "export cannot write" in lines[0] and "reconstruct/model as a compact folder: model." in lines[0]


@pytest.mark.slow
def test_compare_shows_size_and_speed_of_runs_that_have_them(run, tmp_path, capsys):
    compare.main([str(run[0]), f"out={tmp_path}/out"])
    text = (tmp_path / "out/compare.md").read_text()
    assert "size on disk, × of the ordinary folder" in text and "compare_speed.svg" in text
    assert "perplexity" in (tmp_path / "out/compare_speed.svg").read_text()
    assert "decode speed, ×" in capsys.readouterr().out
    older = shutil.copytree(run[0], tmp_path / "older")
    stage = json.loads((older / "speed/stage.json").read_text())
    stage["made_from"]["read"]["prune"] = "hash of another model"
    (older / "speed/stage.json").write_text(json.dumps(stage))
    compare.main([str(older), f"out={tmp_path}/two"])
    text = (tmp_path / "two/compare.md").read_text()
    assert "size on disk" in text and "decode speed" not in text and not (tmp_path / "two/compare_speed.svg").exists()


@pytest.mark.slow
def test_the_command_without_a_compiler(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    folders = [str(run[0] / "reconstruct/model"), str(run[0] / "export/compact")]
    chosen = ["speed.repeats=1", "speed.batches=[1]", "speed.prompt_lengths=[]", "speed.new_tokens=4"]
    monkeypatch.setattr(kernels, "_loaded", [])
    assert main(["speed", *folders, *chosen, f"out={tmp_path}/speed.json"]) == 0
    output = capsys.readouterr().out
    assert "no kernels for compact matrices" in output and "expands each matrix that it uses" in output
    assert f"1  {folders[0]}: ordinary, float32" in output and f"2  {folders[1]}: compact, float32" in output
    assert "prefill" not in output and "48 x 32" in output
    results = json.loads((tmp_path / "speed.json").read_text())
    assert list(results["models"]) == folders and results["machine"]["kernels"] is None


@pytest.mark.slow
def test_a_process_that_dies_is_reported_and_none_survives(run):
    folder = run[0] / "export/compact"
    with start_processes({"one": folder, "two": folder}) as running:
        one, two = running.values()
        assert one.ask("load", str(folder), 1, False)["format"] == "compact"
        with pytest.raises(MeasurementError):
            one.ask("prefill", -1)
        assert one.ask("prefill", 4) > 0
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if "pipeline.speed.worker" in process.cmdline()
        ]
        assert len(workers) == 3
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=f"the process that measured {folder} ended"):
            two.ask("prefill", 4)
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def refused(capsys, *arguments: object) -> str:
    assert main(["speed", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_to_the_command_is_one_line(tiny_llama, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks.safetensors").write_text("x")
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    damaged = shutil.copytree(tiny_llama, tmp_path / "damaged")
    (damaged / "compact.json").write_text("{}")
    for arguments, message in {
        (): "a model folder is needed",
        (tmp_path / "none",): "none does not exist: a model folder is needed",
        (tmp_path / "masks.safetensors",): "masks.safetensors is a file: a model folder is needed",
        (tmp_path / "empty",): "has neither config.json nor compact.json",
        (bare,): "has no weights",
        (damaged,): "compact.json is damaged",
        (tiny_llama, "speed.repeats=0"): "speed.repeats=0 is out of range",
        (tiny_llama, "speed.batches=[0]"): "speed.batches=0 is out of range",
        (tiny_llama, "repeats=3"): "unknown key 'repeats'",
    }.items():
        assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba"])
def test_other_families_are_measured(family, tmp_path):
    """Transposed matrices, experts, and a model without a limit of positions."""
    families.save(family, tmp_path)
    measured = worker.Worker()
    try:
        model = measured.load(str(tmp_path), torch.get_num_threads(), False)
        assert model["generates"] and (model["positions"] is None) == (family == "mamba")
        assert measured.prefill(20) > 0
        seconds, tokens = measured.decode(2, 16, 5)
        assert seconds > 0 and len(tokens) == 5
        assert all(count >= 1 and total > 0 for count, total in measured.products(4).values())
    finally:
        torch.set_grad_enabled(True)  # `load` turns gradients off for its process


@pytest.mark.slow
def test_decoding_is_measured_compiled(run):
    folder, _ = run
    measured = worker.Worker()
    try:
        measured.load(str(folder / "export/compact"), torch.get_num_threads(), False, compiled=True)
        measured.model.generation_config.compile_config.backend = "eager"  # traces only
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plain = worker.Worker()
        plain.load(str(folder / "export/compact"), torch.get_num_threads(), False)
        assert measured.decode(1, 16, 5)[1] == plain.decode(1, 16, 5)[1]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        torch.set_grad_enabled(True)


def test_compiled_decoding_is_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="speed.compiled is for the CPU: set speed.device=cpu"):
        measure._device(Speed(compiled=True))
    assert measure._device(Speed(compiled=True, device="cpu")) == "cpu"


def test_a_note_says_what_a_model_does_not_support():
    notes = []
    assert measure._new_tokens({"a": {"generates": True}, "b": {"generates": False}}, Speed(), None, notes) == 0
    assert notes.pop() == "decoding was not measured: b cannot generate"
    assert measure._new_tokens({"a": {"generates": True}}, Speed(), 16, notes) == 0
    assert "16 positions are too few" in notes.pop()
    assert measure._new_tokens({"a": {"generates": True}}, Speed(new_tokens=5), 2048, notes) == 5
    assert measure._clipped([5, 2], None, notes) == [2, 5] and not notes

"""A signal stops a run after the current layer or step; damaged files are named and made again; the result of the resumed
run equals that of an uninterrupted one."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import launch
from callbacks.stop_at_signal import StopAtSignal
from pipeline.runtime import checksums, signals
from pipeline.runtime.errors import Stopped
from pipeline.stages import runner
from tests.conftest import PRUNE
from tests.faults.harm import change_weights, flip

SECOND = "model-00002-of-00004.safetensors"
TRAIN = ("stages=[prune,finetune]", "finetune.max_steps=60", "finetune.checkpoint_every=1000")
MINE = """
import os, signal
from pipeline.pruning.score_methods import Wanda

class Stopping(Wanda):
    def prune(self, weights, total):
        if f".{os.environ.get('STOP_IN_LAYER')}." in next(iter(weights)):
            del os.environ["STOP_IN_LAYER"]
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prune(weights, total)
"""


def weights(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """An uninterrupted run and its settings."""
    run_dir = tmp_path_factory.mktemp("trained")
    settings = (f"model={tiny_llama}", *TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch.py", *PRUNE, *settings, f"run_dir={run_dir}"])
        assert launch.main() == 0
    return run_dir, settings


@pytest.mark.parametrize("damaged", [None, "model/model-00001-of-00004.safetensors", "masks/00001.safetensors"])
@pytest.mark.slow
def test_a_signal_during_a_layer_then_a_damaged_file(tiny_llama, whole_masks, tmp_path, typed, monkeypatch, damaged):
    (tmp_path / "mine.py").write_text(MINE)
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", f"prune.method={tmp_path}/mine.py")
    monkeypatch.setenv("STOP_IN_LAYER", "1")
    handler = signal.getsignal(signal.SIGTERM)
    code, output, lines = typed(*settings)
    assert code == signals.EXIT_CODE
    assert lines == ["espalier: stopped by SIGTERM after layer 2: run the same command again to resume"]
    assert "layer 2/3" in output and "layer 3/3" not in output
    if damaged:
        flip(tmp_path / "run/.prune" / damaged)
    code, output, _ = typed(*settings)
    assert code == 0
    assert f"{1 if damaged else 2} of 3 layers are already pruned" in output
    assert not damaged or f"damaged files, whose layers are computed again: {damaged}" in output
    assert (tmp_path / "run/prune/masks.safetensors").read_bytes() == whole_masks
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_during_training_then_a_damaged_checkpoint(trained, tmp_path, typed, number):
    whole, settings = trained
    metrics = tmp_path / "run/.finetune/metrics.csv"

    def send() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") > 15):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    code, _, lines = typed(*settings, f"run_dir={tmp_path}/run")
    sender.join()
    assert code == signals.EXIT_CODE and f"stopped by {number.name} after step " in lines[0]
    (checkpoint,) = (tmp_path / "run/.finetune/checkpoints").glob("*.ckpt")
    if number == signal.SIGINT:
        flip(checkpoint)
    code, output, _ = typed(*settings, f"run_dir={tmp_path}/run")
    assert code == 0
    assert (f"resuming from {checkpoint.name}" in output) == (number == signal.SIGTERM)
    assert (f"{checkpoint.name} is damaged" in output) == (number == signal.SIGINT)
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.slow
def test_a_run_folder_may_be_relative_or_a_symlink(tiny_llama, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for run_dir in ("runs/relative", "link/run"):
        code, output, lines = typed(f"model={tiny_llama}", f"run_dir={run_dir}", "stages=[prune,finetune]")
        assert code == 0, lines
        assert "finetune: done in" in output


def test_a_signal_elsewhere_stops_at_once_and_a_second_one_always(capsys):
    handler = signal.getsignal(signal.SIGINT)
    with signals.listening():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        signals.defer_signals()
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher forwards it after the system's signal
        assert signals.received() == "SIGTERM"
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with pytest.raises(Stopped, match="stopped by SIGINT"):  # deferred since the last step
            StopAtSignal().on_train_end(None, None)
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize(
    "file", ["prune/masks.safetensors", "prune/model/config.json", "finetune/model/model-00001-of-00001.safetensors"]
)
@pytest.mark.slow
def test_only_a_damaged_stage_runs_again(trained, typed, file):
    run_dir, settings = trained
    before = weights(run_dir)
    stage, _, rest = file.partition("/")
    made = {name: (run_dir / name / "stage.json").stat().st_mtime_ns for name in ("prune", "finetune")}
    flip(run_dir / file)
    code, output, _ = typed(*settings, f"run_dir={run_dir}")
    assert code == 0 and f"{stage}: {run_dir / file} is damaged or missing (1 in all): running again" in output
    assert {name for name in made if (run_dir / name / "stage.json").stat().st_mtime_ns != made[name]} == {stage}
    assert weights(run_dir) == before


@pytest.mark.slow
def test_stages_run_again_if_the_weights_they_read_changed(trained, typed, tmp_path):
    """For instance if a damaged prune stage gives another result on another GPU."""
    run_dir, settings = shutil.copytree(trained[0], tmp_path / "run"), trained[1]
    change_weights(lambda weights: next(iter(weights.values())).mul_(2), f"prune/model/{SECOND}")(run_dir)
    checksums.record(run_dir / "prune", run_dir / "prune/model" / SECOND)
    code, output, _ = typed(*settings, f"run_dir={run_dir}")
    assert code == 0 and "prune: done before" in output and "finetune: the result of prune changed" in output, output


@pytest.mark.slow
def test_settings_without_influence_do_not_run_a_stage_again(trained, typed):
    run_dir, settings = trained
    changed = ("finetune.checkpoint_every=7", "finetune.effective=cached", "prune.hidden_states=cpu")
    code, output, _ = typed(*settings, f"run_dir={run_dir}", *changed)
    assert code == 0 and output.count("done before") == 2, output


@pytest.mark.slow
def test_an_edited_user_method_prunes_again(tiny_llama, tmp_path, typed):
    path = tmp_path / "mine.py"
    settings = (f"model={tiny_llama}", f"run_dir={tmp_path}/run", f"prune.method={path}")
    for text, says in ((MINE, "prune: running"), (MINE, "prune: done before"), (MINE + "# another", "running again")):
        path.write_text(text)
        code, output, _ = typed(*settings)
        assert code == 0 and says in output, output


@pytest.mark.slow
def test_scratch_files_stay_until_the_stage_is_recorded_as_finished(trained, tmp_path, typed, monkeypatch):
    whole, settings = trained

    fates = iter(["dies", "lives", "dies", "lives"])

    def machine() -> str:  # called between the end of a stage's work and its record
        if next(fates) == "dies":
            raise OSError("died")
        return "a machine"

    monkeypatch.setattr(runner.hardware, "machine", machine)
    codes, output, _ = zip(*(typed(*settings, f"run_dir={tmp_path}/run") for _ in range(3)))
    assert codes == (2, 2, 0)
    assert "3 of 3 layers are already pruned" in output[1] and "resuming from step=60.ckpt" in output[2]
    assert weights(tmp_path / "run") == weights(whole)
    assert not [path for name in runner.SCRATCH for path in (tmp_path / "run").glob(f"*/{name}")]


@pytest.mark.slow
def test_a_kill_just_before_a_stage_is_renamed(trained, typed):
    run_dir, settings = trained
    (run_dir / "prune").rename(run_dir / ".prune")
    code, output, _ = typed(*settings, f"run_dir={run_dir}")
    assert code == 0 and output.count("done before") == 2


@pytest.mark.slow
def test_a_copied_run_is_done(trained, tmp_path, typed):
    run_dir, settings = trained
    for path in run_dir.rglob("*"):
        if path.is_file():
            os.utime(path)
    code, output, _ = typed(*settings, f"run_dir={run_dir}")
    assert code == 0 and output.count("done before") == 2

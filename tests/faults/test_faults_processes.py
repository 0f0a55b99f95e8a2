"""A process that fails ends all others, and only its message is printed; two runs cannot use the same folder."""

import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.runtime import heartbeat, lock, processes
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.stages import runner
from tests.launches import end, fork

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fast_heartbeat(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.4)


def ranks(folder: Path, work, of: int = 2, nodes: int = 1, harm=None, settings=()) -> tuple[list[int], list, float]:
    """Exit codes, our lines of each process, and the seconds from `harm(processes)` to the end of the last process."""
    running = fork(settings, folder / "log", of, nodes, work)
    if harm:
        until = time.monotonic() + 60
        while len(list(folder.glob("ready*"))) < of:
            assert time.monotonic() < until
            time.sleep(0.05)
        harm(running)
        time.sleep(0.5)  # SIGSTOP takes a moment
    started = time.monotonic()
    end([process for process in running if not is_stopped(process)], 100)
    seconds = time.monotonic() - started
    for process in running:
        process.kill()
    codes = end(running)
    logs = [(folder / f"log/{i}.txt").read_text() for i in range(of)]
    assert "Traceback" not in "".join(logs), logs
    return codes, [[line for line in log.splitlines() if line.startswith("espalier: ")] for log in logs], seconds


def is_stopped(process) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def ready_and(folder: Path, then):
    def work(number: int) -> None:
        processes.barrier()
        (folder / f"ready{number}").touch()
        then(number)

    return work


def wait_in_barrier(number: int) -> None:
    processes.barrier() if number == 0 else time.sleep(100)


LOST = [  # signal, process, exit codes, message of the other process
    ("SIGKILL", 1, [2, -9], "process 1 on .* ended without a message"),
    ("SIGKILL", 0, [-9, 2], "process 0 on .* ended without a message"),
    ("SIGSTOP", 1, [2, -9], "process 1 on .* ended without a message"),
    ("SIGSTOP", 0, [-9, 2], "has not answered for"),
    ("SIGTERM", 1, [75, 75], "stopped by SIGTERM"),
]


def lose_process(folder: Path, name: str, number: int) -> tuple[list[int], list, float]:
    """As `ranks`, with one process per machine: if the main process is frozen, the other machine has to report it."""
    work = ready_and(folder, wait_in_barrier)
    return ranks(folder, work, nodes=2, harm=lambda running: os.kill(running[number].pid, getattr(signal, name)))


def test_one_failure_ends_all_and_is_reported_once(tmp_path):
    def work(number: int) -> None:
        if number == 1:
            raise UserError("this text is empty")
        processes.barrier()

    codes, printed, seconds = ranks(tmp_path, work, of=3)
    assert codes == [2, 2, 2] and seconds < 30
    assert printed == [[], ["espalier: this text is empty"], []]


def test_a_common_failure_is_reported_once(tmp_path):
    def work(number: int) -> None:
        raise OSError("no such file")

    codes, printed, _ = ranks(tmp_path, work)
    assert codes == [2, 2] and sorted(printed) == [[], ["espalier: no such file"]]


def test_a_failure_is_reported_once_per_machine(tmp_path):
    def work(number: int) -> None:
        if number == 3:
            raise KeyError("oops")
        processes.barrier()

    codes, printed, _ = ranks(tmp_path, work, of=4, nodes=2)
    assert codes == [2] * 4
    assert [len(lines) for lines in printed] == [1, 0, 0, 1]
    assert f"process 3 on {socket.gethostname()}: 'oops'" in printed[0][0]
    assert f"KeyError: 'oops' ({__file__}, line " in printed[3][0]


@pytest.mark.parametrize(("name", "number", "codes", "says"), LOST)
def test_a_lost_process_ends_the_others(tmp_path, monkeypatch, name, number, codes, says):
    monkeypatch.setattr(heartbeat, "MISSED", 5)
    exit_codes, printed, seconds = lose_process(tmp_path, name, number)
    assert exit_codes == codes and seconds < 30
    lines = [line for lines in printed for line in lines]
    assert lines and all(re.search(says, line.split(": ", 1)[1]) for line in lines), printed


@pytest.mark.parametrize(
    "lives, says", [(False, "process 1 on .* ended without a message"), (True, "process 0 was aborted by a library")]
)
def test_a_process_that_nccl_aborts_says_why_the_run_ends(tmp_path, lives, says):
    def work(number: int) -> None:
        processes.barrier()
        (tmp_path / f"ready{number}").touch()
        if number == 0:
            until = time.monotonic() + 60
            while not (lives or (tmp_path / "killed").exists()) and time.monotonic() < until:
                time.sleep(0.05)
            abort = threading.Thread(target=ctypes.CDLL(None).abort)  # NCCL's watchdog is a thread without Python
            abort.start()
        time.sleep(100)

    def harm(running) -> None:
        if not lives:
            os.kill(running[1].pid, signal.SIGKILL)
            running[1].join()
        (tmp_path / "killed").touch()

    codes, said, seconds = ranks(tmp_path, work, harm=harm)
    assert codes == [2, 2 if lives else -9] and seconds < 30
    assert len(said[0]) == 1 and re.search(says, said[0][0]) and said[1] == [], said


def test_collectives_time_out_after_timeout_minutes(tmp_path):
    codes, printed, seconds = ranks(tmp_path, wait_in_barrier, settings=("timeout_minutes=0.05",))
    assert codes == [2, 2] and seconds < 30
    assert "process 0 waited 0.05 minutes for one that is still working: set a longer timeout_minutes" in printed[0][0]


def test_processes_with_different_settings_are_refused(tmp_path):
    def work(number: int) -> None:
        runner._refuse_other_settings(reader.load([f"prune.sparsity=0.{5 + number}"]))

    codes, printed, _ = ranks(tmp_path, work)
    (line,) = (line for lines in printed for line in lines)
    assert codes == [2, 2] and "was started with other settings" in line and "prune.sparsity 0." in line


def test_machines_without_a_shared_run_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 1.0)

    def work(number: int) -> None:
        with runner._locked(tmp_path / f"disk{number}"):
            pass

    codes, printed, _ = ranks(tmp_path, work, nodes=2)
    assert codes == [2, 2] and all("on a file system that all machines share" in line for (line,) in printed)
    assert not list(tmp_path.glob("disk*/.lock"))


def test_machines_with_a_shared_run_folder_run(tmp_path):
    def work(number: int) -> None:
        with runner._locked(tmp_path / "disk"):
            processes.barrier()

    assert ranks(tmp_path, work, nodes=2)[0] == [0, 0]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks that are not connected: run `srun"),
        ({"MASTER_ADDR": "a", "ACCELERATE_MIXED_PRECISION": "no"}, "the launcher started one"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes were started by a launcher that does not set LOCAL_WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
            "2 machines and 3 processes were requested, 2 of them here",
        ),
    ],
)
def test_wrong_launches_are_refused(monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        processes.start()


def leave_lock(run_dir: Path, **changed) -> Path:
    """A lock that an ended process left."""
    with lock.held(run_dir):
        holder = json.loads((run_dir / ".lock").read_text())
    (run_dir / ".lock").write_text(json.dumps(holder | changed))
    return run_dir / ".lock"


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        lock.held(tmp_path),
        pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .* set another run_dir"),
        lock.held(tmp_path),
    ):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "changed", [{"process": 2**22 + 1}, {"started": 0.0}], ids=["process ended", "process id reused"]
)
def test_a_stale_lock_is_recognised(tmp_path, changed):
    leave_lock(tmp_path, **changed)
    with lock.held(tmp_path):
        pass


def test_a_lock_of_another_machine_is_stale_if_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 3.0)
    path, over = leave_lock(tmp_path, machine="another"), threading.Event()
    alive = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: over.wait(0.2), True)])
    alive.start()
    try:
        with pytest.raises(UserError, match="is in use by process"), lock.held(tmp_path):
            pass
    finally:
        over.set()
        alive.join()
    with lock.held(tmp_path):
        pass
    path.write_text("")  # the process ended before it wrote the lock
    with lock.held(tmp_path):
        pass


def test_only_one_process_takes_over_a_stale_lock(tmp_path):
    leave_lock(tmp_path, started=0.0)
    held, refused, all_there = [], [], threading.Barrier(8)

    def contend() -> None:
        all_there.wait()
        try:
            with lock.held(tmp_path) as token:
                held.append(token)
                while len(refused) < 7:
                    time.sleep(0.01)
        except UserError:
            refused.append(1)

    contenders = [threading.Thread(target=contend) for _ in range(8)]
    for one in contenders:
        one.start()
    for one in contenders:
        one.join(30)
    assert len(held) == 1 and len(refused) == 7

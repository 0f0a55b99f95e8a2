"""Heartbeats between the processes of a run, so that none waits in a collective for a process that has ended.

They use the key-value store of the process group. Each process counts up its beat there every `BEAT` seconds. A process that
fails posts its reason there, and the others end with it.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

BEAT = 1.0  # seconds
MISSED = 40  # beats after which a silent process is considered lost; beats, not time, so that a suspended job survives
ERROR = 2  # the exit code of a run that ends with a message


class Heartbeat:
    """The heartbeat of process `rank`, in threads that run until `stop`."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, local_rank: int, node: int) -> None:
        self.store, self.rank, self.world_size, self.local_rank, self.node = store, rank, world_size, local_rank, node
        self.host = socket.gethostname()
        self.turns = 0  # of the thread that uses the store
        self.stopping = threading.Event()
        self.ending = threading.Lock()  # its holder ends this process
        store.set(f"host/{rank}", self.host)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()
        self._speak_at_abort()

    def stop(self) -> None:
        self.stopping.set()
        self.threads[0].join(MISSED * BEAT)

    def post(self, text: str, code: int = ERROR) -> bool:
        """Posts why the run ends. Returns False if another process has posted first, which then reports its own reason."""
        self.ending.acquire()
        mine = json.dumps({"rank": self.rank, "node": self.node, "host": self.host, "code": code, "text": text})
        try:
            first = self.store.compare_set("end", "", mine).decode()
        except Exception:  # the store is gone, and the main process with it: each node reports for itself
            return self.local_rank == 0
        if first == mine:
            self._wait_until_all_know()
        else:
            self.end_with(json.loads(first))
        return first == mine

    def posted(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("end")) if self.store.check(["end"]) else None

    def end_with(self, reason: dict[str, Any]) -> int:
        """Prints another process's reason if that process runs on another node. Returns the exit code."""
        if reason["node"] != self.node and self.local_rank == 0:
            _say(f"process {reason['rank']} on {reason['host']}: {reason['text']}")
        self.store.add("know", 1)
        if self.rank == 0:
            self._wait_until_all_know()
        return reason["code"]

    def lost(self) -> dict[str, Any] | str | None:
        """What another process posted, or else a message that names the silent ones, if any. Takes three beats."""
        try:
            before = self._beats()
            for _ in range(15):
                if reason := self.posted():
                    return reason
                time.sleep(BEAT / 5)
            silent = [rank for rank, beat in self._beats().items() if beat == before[rank]]
        except Exception:  # the store is gone
            silent = [0]
        return self._lost_message(silent) if silent else None

    def _speak_at_abort(self) -> None:
        """NCCL ends a process by abort(), after a time-out or at once where a peer's connection breaks. A handler of Python's
        own would run too late, in the main thread."""
        c = ctypes.CDLL(None)

        def say_why(number: int) -> None:
            c.alarm(int(MISSED * BEAT))  # ends the process, whatever happens here
            reason = self.lost()
            if isinstance(reason, dict):
                _exit(self.end_with(reason))
            self._end(
                reason
                or f"process {self.rank} was aborted by a library (what it said stands above): if NCCL timed out, one process "
                "was still at work: set a longer timeout_minutes"
            )
            time.sleep(MISSED * BEAT)  # the main thread says why already, and then ends the process

        self.at_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(say_why)  # kept, or it would be freed
        c.signal(signal.SIGABRT, self.at_abort)

    def _lost_message(self, ranks: list[int]) -> str:
        names = ", ".join(f"{rank} on {self._host(rank)}" for rank in ranks)
        return (
            f"process {names} ended without a message (killed, out of memory or disconnected): run the same command again "
            "to resume"
        )

    def _host(self, rank: int) -> str:
        try:
            return self.store.get(f"host/{rank}").decode()
        except Exception:
            return os.environ.get("MASTER_ADDR", "?")

    def _beats(self) -> dict[int, int]:
        return {rank: self.store.add(f"beat/{rank}", 0) for rank in range(self.world_size) if rank != self.rank}

    def _beat(self) -> None:
        """Process 0 watches all others and they watch it, so the work grows with their number and not with its square."""
        peers = range(1, self.world_size) if self.rank == 0 else [0]
        seen = {rank: (-1, 0) for rank in peers}  # rank -> (last beat, turns since it changed)
        try:
            while not self.stopping.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)
                self.turns += 1
                if reason := self.posted():
                    if self.ending.acquire(blocking=False):
                        _exit(self.end_with(reason))
                    return
                for rank, (last, missed) in seen.items():
                    beat = self.store.add(f"beat/{rank}", 0)
                    seen[rank] = (beat, missed + 1 if beat == last else 0)
                if silent := [rank for rank, (_, missed) in seen.items() if missed >= MISSED]:
                    self._end(self._lost_message(silent))
        except Exception:
            if not self.stopping.is_set():
                self._end(self._lost_message([0]))

    def _watch_store(self) -> None:
        """Ends this process when `_beat` hangs: if the store's machine is frozen, calls neither return nor fail."""
        last = missed = 0
        while missed < MISSED and not self.stopping.wait(BEAT):
            last, missed = self.turns, missed + 1 if self.turns == last else 0
        if missed == MISSED and self.ending.acquire(blocking=False):
            if self.local_rank == 0:
                _say(
                    f"the main process on {os.environ.get('MASTER_ADDR')} has not answered for {MISSED * BEAT:g} s: run the "
                    "same command again to resume"
                )
            _exit(ERROR)

    def _end(self, text: str) -> None:
        if self.ending.locked():
            return
        if self.post(text):
            _say(text)
        _exit(ERROR)

    def _wait_until_all_know(self) -> None:
        """Waits for at most 3 beats: unless the launcher holds the store, it ends with process 0."""
        deadline = time.monotonic() + 3 * BEAT
        with suppress(Exception):
            while time.monotonic() < deadline and self.store.add("know", 0) < self.world_size - 1:
                time.sleep(BEAT / 20)


def _say(text: str) -> None:
    print(f"espalier: {text}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """Ends the process although the main thread may hang in a collective. Files are written atomically, so none is damaged."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

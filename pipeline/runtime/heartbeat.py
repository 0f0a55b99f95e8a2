"""Owns what the processes of a run know of each other: who is alive, and why one of them ended the run.

All of it goes through the key-value store that the process group was joined by. Each process leaves a sign of life there
every `BEAT` seconds; the one that fails leaves its reason, and the others end with it instead of waiting in a collective
for a process that is gone.
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
MISSED = 40  # beats without a sign after which a process is taken for lost; counted, so that a suspended job survives
ERROR = 2  # the exit code that goes with a message


class Heartbeat:
    """The signs of life of process `rank`, given by a thread of its own until `stop`."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, local_rank: int, node: int) -> None:
        self.store, self.rank, self.world_size, self.local_rank, self.node = store, rank, world_size, local_rank, node
        self.host = socket.gethostname()
        self.turns = 0  # of the thread that speaks to the store
        self.stopping = threading.Event()
        self.ending = threading.Lock()  # who holds it ends this process
        store.set(f"host/{rank}", self.host)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._live, self._watch_the_store)]
        for thread in self.threads:
            thread.start()
        self._speak_at_abort()

    def stop(self) -> None:
        self.stopping.set()
        self.threads[0].join(MISSED * BEAT)

    def post(self, text: str, code: int = ERROR) -> bool:
        """Leaves the reason for the end of the run. False where another process was first, and says its own."""
        self.ending.acquire()
        mine = json.dumps({"rank": self.rank, "node": self.node, "host": self.host, "code": code, "text": text})
        try:
            first = self.store.compare_set("end", "", mine).decode()
        except Exception:  # the store is gone, and with it the main process, but for which this one may speak
            return self.local_rank == 0
        if first == mine:
            self._wait_until_all_know()
        else:
            self.end_with(json.loads(first))
        return first == mine

    def posted(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("end")) if self.store.check(["end"]) else None

    def end_with(self, reason: dict[str, Any]) -> int:
        """Says on another machine than the failing one's why the run ends; returns the exit code."""
        if reason["node"] != self.node and self.local_rank == 0:
            _say(f"process {reason['rank']} on {reason['host']}: {reason['text']}")
        self.store.add("know", 1)
        if self.rank == 0:
            self._wait_until_all_know()
        return reason["code"]

    def lost(self) -> dict[str, Any] | str | None:
        """What another process posted, or which of them gives no sign any more; takes a few beats."""
        try:
            before = self._beats()
            for _ in range(15):
                if reason := self.posted():
                    return reason
                time.sleep(BEAT / 5)
            silent = [rank for rank, beat in self._beats().items() if beat == before[rank]]
        except Exception:  # the store is gone
            silent = [0]
        return self._ended(silent) if silent else None

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

    def _ended(self, ranks: list[int]) -> str:
        names = ", ".join(f"{rank} on {self._host(rank)}" for rank in ranks)
        return (
            f"process {names} ended without a word (killed, out of memory, or cut off): the same command goes on from "
            "what is finished"
        )

    def _host(self, rank: int) -> str:
        try:
            return self.store.get(f"host/{rank}").decode()
        except Exception:
            return os.environ.get("MASTER_ADDR", "?")

    def _beats(self) -> dict[int, int]:
        return {rank: self.store.add(f"beat/{rank}", 0) for rank in range(self.world_size) if rank != self.rank}

    def _live(self) -> None:
        """Process 0 looks after all others, they look after it: the work grows with their number, not its square."""
        peers = range(1, self.world_size) if self.rank == 0 else [0]
        seen = {rank: (-1, 0) for rank in peers}  # rank -> its last beat, and for how many turns it has been that
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
                    self._end(self._ended(silent))
        except Exception:
            if not self.stopping.is_set():
                self._end(self._ended([0]))

    def _watch_the_store(self) -> None:
        """A store whose machine stands still answers neither yes nor no."""
        last = missed = 0
        while missed < MISSED and not self.stopping.wait(BEAT):
            last, missed = self.turns, missed + 1 if self.turns == last else 0
        if missed == MISSED and self.ending.acquire(blocking=False):
            if self.local_rank == 0:
                _say(self._ended_host())
            _exit(ERROR)

    def _ended_host(self) -> str:
        return (
            f"the main process on {os.environ.get('MASTER_ADDR')} has not answered for {MISSED * BEAT:g} s: the same command "
            "goes on from what is finished"
        )

    def _end(self, text: str) -> None:
        if self.ending.locked():
            return
        if self.post(text):
            _say(text)
        _exit(ERROR)

    def _wait_until_all_know(self) -> None:
        """For without a launcher that holds it, the store ends with process 0; and there may be one that never will."""
        until = time.monotonic() + 3 * BEAT
        with suppress(Exception):
            while time.monotonic() < until and self.store.add("know", 0) < self.world_size - 1:
                time.sleep(BEAT / 20)


def _say(text: str) -> None:
    print(f"espalier: {text}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """Without the main thread, which may wait in a collective for ever. What is on disk is whole at any moment."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Heartbeats between the processes of a run, so that no process waits in a collective for one that has ended.

They use the key-value store of the process group. Each process increments its counter there every `BEAT` seconds. A process
that fails posts the reason there, and the other processes end with it.
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
MISSED = 40  # missed beats after which a process is considered lost; not a time, so that a suspended job survives
ERROR = 2  # the exit code of a run that ends with a message


class Heartbeat:
    """The heartbeat of process `rank`, in threads that run until `stop`."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, local_rank: int, node: int) -> None:
        self.store, self.rank, self.world_size, self.local_rank, self.node = store, rank, world_size, local_rank, node
        self.host = socket.gethostname()
        self.turns = 0  # iterations of the thread that uses the store
        self.stopping = threading.Event()
        self.ending = threading.Lock()  # its holder ends this process
        store.set(f"host/{rank}", self.host)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()
        self._handle_abort()

    def stop(self) -> None:
        self.stopping.set()
        self.threads[0].join(MISSED * BEAT)
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # the default, because the handler ends with this object

    def post(self, text: str, code: int = ERROR) -> bool:
        """Posts why the run ends. Returns False if another process posted first and therefore reports its reason."""
        self.ending.acquire()
        reason = json.dumps({"rank": self.rank, "node": self.node, "host": self.host, "code": code, "text": text})
        try:
            first = self.store.compare_set("end", "", reason).decode()
        except Exception:  # the store is gone, and the main process with it: each node reports separately
            return self.local_rank == 0
        if first == reason:
            self._wait_until_all_informed()
        else:
            self.end_with(json.loads(first))
        return first == reason

    def posted(self) -> dict[str, Any] | None:
        return json.loads(self.store.get("end")) if self.store.check(["end"]) else None

    def end_with(self, reason: dict[str, Any]) -> int:
        """Prints another process's reason if that process runs on another node. Returns the exit code."""
        if reason["node"] != self.node and self.local_rank == 0:
            _print(f"process {reason['rank']} on {reason['host']}: {reason['text']}")
        self.store.add("informed", 1)
        if self.rank == 0:
            self._wait_until_all_informed()
        return reason["code"]

    def lost(self) -> dict[str, Any] | str | None:
        """The reason that another process posted, or else a message that names silent processes, or None. Takes three
        beats."""
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

    def _handle_abort(self) -> None:
        """NCCL ends a process by abort(), after a time-out or when a peer's connection breaks. This installs a C handler that
        prints the reason: one of Python's `signal` would run too late, in the main thread."""
        c = ctypes.CDLL(None)

        def on_abort(number: int) -> None:
            c.alarm(int(MISSED * BEAT))  # ends the process even if the handler hangs
            reason = self.lost()
            if isinstance(reason, dict):
                _exit(self.end_with(reason))
            self._end(
                reason
                or f"process {self.rank} was aborted by a library, whose message is above: if NCCL timed out while another "
                "process was still working, set a longer timeout_minutes"
            )
            time.sleep(MISSED * BEAT)  # the main thread is already printing a reason and will end the process

        self.abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)  # a reference, or it would be freed
        c.signal(signal.SIGABRT, self.abort_handler)

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
        """Process 0 watches all others, and they watch process 0, so the work is linear in the number of processes."""
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
        """Ends this process if `_beat` hangs: while the store's machine is frozen, calls neither return nor fail."""
        last = missed = 0
        while missed < MISSED and not self.stopping.wait(BEAT):
            last, missed = self.turns, missed + 1 if self.turns == last else 0
        if missed == MISSED and self.ending.acquire(blocking=False):
            if self.local_rank == 0:
                _print(
                    f"the main process on {os.environ.get('MASTER_ADDR')} has not answered for {MISSED * BEAT:g} s: run the "
                    "same command again to resume"
                )
            _exit(ERROR)

    def _end(self, text: str) -> None:
        if self.ending.locked():
            return
        if self.post(text):
            _print(text)
        _exit(ERROR)

    def _wait_until_all_informed(self) -> None:
        """Waits for at most 3 beats, because the store may end with process 0."""
        deadline = time.monotonic() + 3 * BEAT
        with suppress(Exception):
            while time.monotonic() < deadline and self.store.add("informed", 0) < self.world_size - 1:
                time.sleep(BEAT / 20)


def _print(text: str) -> None:
    print(f"espalier: {text}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """Ends the process even if the main thread hangs in a collective. Files are written atomically, so none is damaged."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

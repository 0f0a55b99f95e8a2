"""`python -m pipeline.speed.worker DESCRIPTOR ...`: one worker process per model, so that models share no memory or threads.

A single worker is this process. Several workers are forked from a process that has only imported the libraries, because
imports take seconds. Each worker reads requests from its socket, given as a file descriptor. A request is a JSON line: a list
of the name of a method of `Worker` and its arguments. The answer is a JSON line too.
"""

import gc
import importlib.metadata
import inspect
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from pipeline.compact import gpu_weight
from pipeline.compact.compact_model import load_compact
from pipeline.compact.compiled import compile_decoding
from pipeline.compact.file_format import MANIFEST, CompactFolder
from pipeline.models import loading, model_files
from pipeline.runtime.errors import one_line
from pipeline.settings.schema import Recipe

BLOCK = 1 << 24  # bytes
GROUP = 16  # products that are launched while the GPU sleeps
SLEEP = 4_000_000  # its cycles: two milliseconds, in which the launches fit


class Worker:
    """Measures one model. The methods return data that JSON can represent."""

    def load(
        self, folder: str, threads: int, trust_remote_code: bool, device: str = "cpu", compiled: bool = False
    ) -> dict[str, Any]:
        """Loads an ordinary or a compact folder. Reads its files once before, so that the disk's speed does not count.
        `compiled`: `decode` compiles its steps.

        "memory_bytes": the growth of resident memory up to the first token; on a GPU, the most allocated for that token.
        "load_seconds" does not include work that is deferred to the first use of the weights; "first_token_seconds" does.
        "forms": how a GPU holds the matrices, see `Forms.table`.
        """
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        recipe, path = Recipe(trust_remote_code=trust_remote_code), Path(folder)
        is_compact = (path / MANIFEST).is_file()
        weights = CompactFolder(path).shards if is_compact else model_files.weight_files(path)
        for file in weights:
            _read(file)
        triton = self._prepare_gpu() if self.device.type == "cuda" else None
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        self.model = (
            load_compact(path, recipe, self.device) if is_compact else loading.load(path, recipe).to(self.device)
        )
        loaded = self._seconds_since(started)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        self.model(input_ids=self._ids(1, 1))
        first_token = self._seconds_since(started)
        gc.collect()
        memory = psutil.Process().memory_info().rss - before
        config = self.model.config
        # the model's configuration may stop early, sample, or penalise repetition
        self.model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        if compiled:
            compile_decoding(self.model)
        return {
            "format": "compact" if is_compact else "ordinary",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "file_bytes": sum(file.stat().st_size for file in weights),
            "load_seconds": loaded,
            "first_token_seconds": first_token,
            "memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else memory,
            "forms": getattr(self.model, "compact_forms", []),
            "triton": triton,
            "positions": loading.positions(config),
            "generates": bool(self.model.can_generate()),
        }

    def prefill(self, tokens: int) -> float:
        """Seconds of one forward pass over a prompt, with logits of the last token only if the model supports that."""
        parameters = inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        ids = self._ids(1, tokens)
        started = time.perf_counter()
        self.model(input_ids=ids, **options)
        return self._seconds_since(started)

    def decode(self, batch: int, prompt: int, new: int) -> tuple[float, list[int]]:
        """Seconds of a greedy generation, prompt included, and the new tokens of the first sequence."""
        ids = self._ids(batch, prompt)
        started = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        seconds = self._seconds_since(started)
        if out.shape != (batch, prompt + new):
            raise ValueError(f"generate returned the shape {tuple(out.shape)}, not {(batch, prompt + new)}")
        return seconds, out[0, prompt:].tolist()

    def products(self, tokens: int) -> dict[str, tuple[int, float]]:
        """By shape "out x in": the number of Linear and Conv1D modules, and the total seconds of one product with each.

        One pass over the whole model, as in decoding, so that weights come from memory and not from a cache. Fused experts
        are not measured. On a GPU, its own time, without the launch.
        """
        totals: dict[str, tuple[int, float]] = {}
        measured = []
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear | Conv1D)]
        for number, module in enumerate(layers):
            if self.device.type == "cuda" and number % GROUP == 0:
                torch.cuda._sleep(SLEEP)
            is_conv = isinstance(module, Conv1D)
            outputs, inputs = (module.nf, module.nx) if is_conv else (module.out_features, module.in_features)
            x = torch.ones(1, tokens, inputs, dtype=module.weight.dtype, device=self.device)
            started = self._mark()
            module(x)
            measured.append((f"{outputs} x {inputs}", started, self._mark()))
        self._wait()
        for shape, started, ended in measured:
            seconds = started.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - started
            count, total = totals.get(shape, (0, 0.0))
            totals[shape] = (count + 1, total + seconds)
        return totals

    def _prepare_gpu(self) -> str | None:
        """Starts the GPU, and compiles Triton's kernels; its version, or None without them."""
        torch.zeros(1, device=self.device)
        if gpu_weight.KERNELS.load(torch.device("cuda", torch.cuda.current_device())) is None:
            return None
        return importlib.metadata.version("triton")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _seconds_since(self, started: float) -> float:
        self._wait()
        return time.perf_counter() - started

    def _mark(self) -> Any:
        """A time: a number, or an event in the GPU's queue."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Random ids, (batch, tokens), equal for models with the same vocabulary. Low ids only: those of images come last."""
        limit = min(1000, self.model.config.get_text_config().vocab_size)
        ids = torch.randint(0, limit, (batch, tokens), generator=torch.Generator().manual_seed(0))
        return ids.to(self.device)


def _read(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(BLOCK):
            pass


def serve(connection: socket.socket) -> None:
    worker, lines = Worker(), connection.makefile("rw")
    for line in lines:  # ends when the measuring process does
        name, *arguments = json.loads(line)
        try:
            answer = {"result": getattr(worker, name)(*arguments)}
        except Exception as error:
            answer = {"error": one_line(error) or type(error).__name__}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def main(descriptors: list[int]) -> None:
    if len(descriptors) == 1:
        serve(socket.socket(fileno=descriptors[0]))
        return
    for descriptor in descriptors:
        if os.fork() == 0:
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            serve(socket.socket(fileno=descriptor))
            return
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))

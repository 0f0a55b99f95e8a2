"""`python -m pipeline.speed.worker DESCRIPTOR ...`: one worker process per model, so that models share no memory or threads.

The workers are forked from a process that has only imported the libraries, because imports take seconds. Each worker reads
requests from its socket, given as a file descriptor. A request is a JSON line: a list of the name of a method of `Worker` and
its arguments. The answer is a JSON line too.
"""

import gc
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

from pipeline.compact.compact_model import load_compact
from pipeline.compact.file_format import MANIFEST, CompactFolder
from pipeline.models import loading, model_files
from pipeline.runtime.errors import one_line
from pipeline.settings.schema import Recipe

BLOCK = 1 << 24  # bytes


class Worker:
    """Measures one model. The methods return data that JSON can represent."""

    def load(self, folder: str, threads: int, trust_remote_code: bool) -> dict[str, Any]:
        """Loads an ordinary or a compact folder. Reads its files once before, so that the disk's speed does not count.

        "memory_bytes": the growth of resident memory up to the first token. "load_seconds" does not include work that is
        deferred to the first use of the weights; "first_token_seconds" does.
        """
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        recipe, path = Recipe(trust_remote_code=trust_remote_code), Path(folder)
        is_compact = (path / MANIFEST).is_file()
        weights = CompactFolder(path).shards if is_compact else model_files.weight_files(path)
        for file in weights:
            _read(file)
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        self.model = load_compact(path, recipe) if is_compact else loading.load(path, recipe)
        loaded = time.perf_counter() - started
        self.model(input_ids=self._ids(1, 1))
        first_token = time.perf_counter() - started
        gc.collect()
        config = self.model.config
        # the model's configuration may stop early, sample, or penalise repetition
        self.model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        return {
            "format": "compact" if is_compact else "ordinary",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "file_bytes": sum(file.stat().st_size for file in weights),
            "load_seconds": loaded,
            "first_token_seconds": first_token,
            "memory_bytes": psutil.Process().memory_info().rss - before,
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
        return time.perf_counter() - started

    def decode(self, batch: int, prompt: int, new: int) -> tuple[float, list[int]]:
        """Seconds of a greedy generation, prompt included, and the new tokens of the first sequence."""
        ids = self._ids(batch, prompt)
        started = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        seconds = time.perf_counter() - started
        if out.shape != (batch, prompt + new):
            raise ValueError(f"generate returned the shape {tuple(out.shape)}, not {(batch, prompt + new)}")
        return seconds, out[0, prompt:].tolist()

    def products(self, tokens: int) -> dict[str, tuple[int, float]]:
        """By shape "out x in": the number of Linear and Conv1D modules, and the total seconds of one product with each.

        One pass over the whole model, as in decoding, so that weights come from memory and not from a cache. Fused experts
        are not measured.
        """
        totals: dict[str, tuple[int, float]] = {}
        for module in self.model.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            is_conv = isinstance(module, Conv1D)
            outputs, inputs = (module.nf, module.nx) if is_conv else (module.out_features, module.in_features)
            x = torch.ones(1, tokens, inputs, dtype=module.weight.dtype)
            started = time.perf_counter()
            module(x)
            seconds = time.perf_counter() - started
            count, total = totals.get(shape := f"{outputs} x {inputs}", (0, 0.0))
            totals[shape] = (count + 1, total + seconds)
        return totals

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Random ids, (batch, tokens), equal for models with the same vocabulary. Low ids only: those of images come last."""
        limit = min(1000, self.model.config.get_text_config().vocab_size)
        return torch.randint(0, limit, (batch, tokens), generator=torch.Generator().manual_seed(0))


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

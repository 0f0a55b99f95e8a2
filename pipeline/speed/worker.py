"""`python -m pipeline.speed.worker SOCKET ...`: each model in a process of its own, so that memory and threads are its alone.

They are forked from one that has imported the libraries and used none, as imports take seconds. Over its socket (a file
descriptor) each is sent lines, JSON lists of the name of a function of `Worker` and its arguments; the answer is a JSON line.
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
    """Answers are plain data."""

    def load(self, folder: str, threads: int, trust_remote_code: bool) -> dict[str, Any]:
        """Loads an ordinary or a compact folder, whose files have been read once: a disk's speed is not the model's.

        "memory_bytes": resident after the first token, less what the process had before. "load_seconds" may leave work to the
        first use of the weights, which "first_token_seconds" includes.
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
        first = time.perf_counter() - started
        gc.collect()
        config = self.model.config
        # the model's own may stop early, sample, or repeat less
        self.model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        return {
            "format": "compact" if is_compact else "ordinary",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "file_bytes": sum(file.stat().st_size for file in weights),
            "load_seconds": loaded,
            "first_token_seconds": first,
            "memory_bytes": psutil.Process().memory_info().rss - before,
            "positions": loading.positions(config),
            "generates": bool(self.model.can_generate()),
        }

    def prefill(self, tokens: int) -> float:
        """Seconds of one forward pass over a prompt; the head sees its last token only, where the model can do that."""
        takes = inspect.signature(self.model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        ids = self._ids(1, tokens)
        started = time.perf_counter()
        self.model(input_ids=ids, **last)
        return time.perf_counter() - started

    def decode(self, batch: int, prompt: int, new: int) -> tuple[float, list[int]]:
        """Seconds of a greedy generation, prompt included, and the new tokens of its first text."""
        ids = self._ids(batch, prompt)
        started = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        seconds = time.perf_counter() - started
        if out.shape != (batch, prompt + new):
            raise ValueError(f"generate gave {tuple(out.shape)} in place of {(batch, prompt + new)}")
        return seconds, out[0, prompt:].tolist()

    def products(self, tokens: int) -> dict[str, tuple[int, float]]:
        """By shape "out x in": how many Linear or Conv1D there are, and the seconds of one product each with `tokens` inputs.

        One pass over all of the model, as in decoding, so that weights come from memory and not from a cache. Fused experts
        are not among them.
        """
        found: dict[str, tuple[int, float]] = {}
        for module in self.model.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            sizes = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
            x = torch.ones(1, tokens, sizes[1], dtype=module.weight.dtype)
            started = time.perf_counter()
            module(x)
            seconds = time.perf_counter() - started
            count, total = found.get(shape := f"{sizes[0]} x {sizes[1]}", (0, 0.0))
            found[shape] = (count + 1, total + seconds)
        return found

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        """(batch, tokens), the same for every model of a vocabulary; the lowest ids, as special ones of images come last."""
        known = min(1000, self.model.config.get_text_config().vocab_size)
        return torch.randint(0, known, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _read(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(BLOCK):
            pass


def serve(connection: socket.socket) -> None:
    worker, lines = Worker(), connection.makefile("rw")
    for line in lines:  # ends with the process that asks
        name, *arguments = json.loads(line)
        try:
            answer = {"is": getattr(worker, name)(*arguments)}
        except Exception as error:
            answer = {"failed": one_line(error) or type(error).__name__}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def main(numbers: list[int]) -> None:
    for number in numbers:
        if os.fork() == 0:
            for other in numbers:
                if other != number:
                    os.close(other)
            serve(socket.socket(fileno=number))
            return
    for number in numbers:
        os.close(number)
    for _ in numbers:
        os.wait()


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))

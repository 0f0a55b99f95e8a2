"""Measures models against each other: each in a process of its own, in turns, so that a machine's mood meets all alike."""

import os
import statistics
from pathlib import Path
from typing import Any

import torch

from pipeline.compact import kernels
from pipeline.runtime import hardware, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Speed
from pipeline.speed.process import CannotMeasure, Process, started

PROMPT = 16  # tokens before those that are generated
FEW = (1, 4, 16)  # tokens of the products by shape
# instructions that decide how fast products are
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def measure(folders: dict[str, Path], settings: Speed, trust_remote_code: bool = False) -> dict[str, Any]:
    """The models in `folders`, ordinary or compact, by name; the first is what the others are compared with.

    {"models": {name: {"format", "dtype", "file_bytes", "memory_bytes", "load_seconds", "first_token_seconds",
    "prefill": {tokens: rates}, "decode": {batch: rates}}}, "products": [{"shape", "matrices", "tokens", "microseconds": {name:
    median}}], "same_tokens": {name: share}, "machine", "settings", "notes"}. Rates are {"median", "least", "most", "all"} in
    tokens per second, "all" in the order of the turns. "same_tokens": of a greedy generation, as the first model's.

    Raises `UserError` where a folder cannot be loaded, or its process dies.
    """
    threads, notes = settings.threads or torch.get_num_threads(), []
    operators = kernels.load()  # built here if need be, and says so once
    load = os.getloadavg()[0]
    if operators is None:
        notes.append(
            "no kernels for compact matrices on this machine: a compact model expands each matrix that it uses"
        )
    with started(folders) as running:
        models = {}
        for name, process in running.items():
            try:
                models[name] = process.ask("load", str(process.folder), threads, trust_remote_code)
            except CannotMeasure as error:
                raise UserError(f"{process.folder} cannot be measured: {error}") from error
        known = [about.pop("positions") for about in models.values()]
        positions = min((it for it in known if it), default=None)
        turns = _Turns(running, settings.repeats, notes)
        lengths = _clipped(settings.prompt_lengths, positions, notes)
        prefill = {length: turns.ask(f"prefill of {length} tokens", "prefill", length) for length in lengths}
        new = _new_tokens(models, settings, positions, notes)
        batches = sorted(set(settings.batches)) if new else []
        decode = {batch: turns.ask(f"decoding at batch {batch}", "decode", batch, PROMPT, new) for batch in batches}
        products = _products(turns)
    for name, about in models.items():
        about["prefill"] = {str(length): _rates(length, found[name]) for length, found in prefill.items() if found}
        about["decode"] = {
            str(batch): _rates(batch * new, [seconds for seconds, _ in found[name]])
            for batch, found in decode.items()
            if found
        }
    return {
        "models": models,
        "products": products,
        "same_tokens": next((_same_tokens(found) for found in decode.values() if found), {}),
        "machine": _machine(threads, load, operators is not None),
        "settings": {
            "repeats": settings.repeats,
            "prompt": PROMPT,
            "new_tokens": new,
            "threads": threads,
        },
        "notes": notes,
    }


class _Turns:
    """Asks all processes in turns; what a model cannot do is a note."""

    def __init__(self, running: dict[str, Process], repeats: int, notes: list[str]) -> None:
        self.running, self.repeats, self.notes = running, repeats, notes
        self.report = processes.progress("  speed: ")

    def ask(self, what: str, name: str, *arguments: Any) -> dict[str, list[Any]] | None:
        """The answers by model, one a turn; a first turn, which warms up, is left out. None where a model fails."""
        answers: dict[str, list[Any]] = {model: [] for model in self.running}
        for turn in range(self.repeats + 1):
            self.report(f"{what}, {turn} of {self.repeats}")
            for model, process in self.running.items():
                try:
                    answers[model].append(process.ask(name, *arguments))
                except CannotMeasure as error:
                    self.notes.append(f"{what} was not measured: {model}: {str(error)[:300]}")
                    return None
        return {model: found[1:] for model, found in answers.items()}


def _new_tokens(models: dict[str, dict], settings: Speed, positions: int | None, notes: list[str]) -> int:
    """How many tokens are generated; 0 where a model cannot, or has no room."""
    cannot = [name for name, about in models.items() if not about.pop("generates")]
    new = settings.new_tokens
    if not settings.batches:
        return 0
    if cannot:
        notes.append(f"decoding was not measured: {cannot[0]} cannot generate")
        return 0
    if positions and positions <= PROMPT:
        notes.append(f"decoding was not measured: {positions} positions have no room after a prompt of {PROMPT} tokens")
        return 0
    if positions and positions < PROMPT + new:
        notes.append(f"{positions - PROMPT} tokens are generated, not {new}: the model has {positions} positions")
        return positions - PROMPT
    return new


def _same_tokens(found: dict[str, list]) -> dict[str, float]:
    """The share of generated tokens that are the first model's, of each other."""
    (_, (_, first)), *others = [(name, answers[0]) for name, answers in found.items()]
    return {name: sum(map(int.__eq__, tokens, first)) / len(first) for name, (_, tokens) in others}


def _products(turns: _Turns) -> list[dict[str, Any]]:
    """By shape and number of tokens, the median microseconds of one product in each model; shapes that all models have."""
    rows = []
    for tokens in FEW:
        answers = turns.ask(f"products with {tokens} tokens", "products", tokens)
        if answers is None:
            break
        first, *others = (found[0] for found in answers.values())
        for shape, (count, _) in first.items():
            if all(shape in other for other in others):
                medians = {
                    name: 1e6 * statistics.median(total / many for many, total in (it[shape] for it in found))
                    for name, found in answers.items()
                }
                rows.append({"shape": shape, "matrices": count, "tokens": tokens, "microseconds": medians})
    return sorted(rows, key=lambda row: list(map(int, row["shape"].split(" x "))))


def _clipped(lengths: list[int], positions: int | None, notes: list[str]) -> list[int]:
    if positions and any(length > positions for length in lengths):
        notes.append(f"prompts are cut to the model's {positions} positions")
        lengths = [min(length, positions) for length in lengths]
    return sorted(set(lengths))


def _rates(tokens: int, seconds: list[float]) -> dict[str, Any]:
    values = [tokens / it for it in seconds]
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": values}


def _machine(threads: int, load: float, built: bool) -> dict[str, Any]:
    return {
        "hardware": hardware.machine(),
        "flags": sorted(set(FLAGS) & kernels.cpu_flags()),
        "kernels": kernels.best() if built else None,
        "threads": threads,
        "torch": torch.__version__,
        "load": round(load, 1),  # of the machine, before
    }

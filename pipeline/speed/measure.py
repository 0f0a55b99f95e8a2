"""Measures models against each other, each in a separate process. The processes alternate, so that a change of the machine's
speed affects all models alike."""

import os
import statistics
from pathlib import Path
from typing import Any

import torch

from pipeline.compact import kernels
from pipeline.runtime import hardware, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Speed
from pipeline.speed.process import MeasurementError, Process, start_processes

PROMPT = 16  # tokens before the generated ones
PRODUCT_TOKENS = (1, 4, 16)
# the instructions that determine the speed of matrix products
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def measure(folders: dict[str, Path], settings: Speed, trust_remote_code: bool = False) -> dict[str, Any]:
    """Measures the models in `folders`, ordinary or compact, by name. The first one is the reference.

    {"models": {name: {"format", "dtype", "file_bytes", "memory_bytes", "load_seconds", "first_token_seconds",
    "prefill": {tokens: rates}, "decode": {batch: rates}}}, "products": [{"shape", "matrices", "tokens", "microseconds": {name:
    median}}], "same_tokens": {name: share}, "machine", "settings", "notes"}. Rates are {"median", "least", "most", "all"} in
    tokens per second, "all" in the order of the repeats. A model on a GPU has "forms" too, see
    `Forms.table`. "same_tokens" is the share of greedily generated tokens that equal the first model's.

    Raises `UserError` if a folder cannot be loaded, or if its process dies.
    """
    threads, notes, device = settings.threads or torch.get_num_threads(), [], _device(settings)
    operators = kernels.load() if device == "cpu" else None  # compiles them here, once, if necessary
    load_average = os.getloadavg()[0]
    with start_processes(folders, device) as running:
        models = {}
        for name, process in running.items():
            try:
                models[name] = process.ask(
                    "load", str(process.folder), threads, trust_remote_code, device, settings.compiled
                )
            except MeasurementError as error:
                raise UserError(f"{process.folder} cannot be measured: {error}") from error
        triton, *_ = [model.pop("triton") for model in models.values()]
        served_by = triton and f"Triton {triton}" if device == "cuda" else operators and kernels.best()
        if not served_by:
            notes.append(
                "no kernels for compact matrices on this machine: a compact model expands each matrix that it uses"
            )
        positions = min(filter(None, [model.pop("positions") for model in models.values()]), default=None)
        repeats = _Repeats(running, settings.repeats, notes)
        lengths = _clipped(settings.prompt_lengths, positions, notes)
        prefill = {length: repeats.ask(f"prefill of {length} tokens", "prefill", length) for length in lengths}
        new = _new_tokens(models, settings, positions, notes)
        batches = sorted(set(settings.batches)) if new else []
        decode = {batch: repeats.ask(f"decoding at batch {batch}", "decode", batch, PROMPT, new) for batch in batches}
        products = _products(repeats)
    for name, model in models.items():
        model["prefill"] = {
            str(length): _rates(length, answers[name]) for length, answers in prefill.items() if answers
        }
        model["decode"] = {
            str(batch): _rates(batch * new, [seconds for seconds, _ in answers[name]])
            for batch, answers in decode.items()
            if answers
        }
    return {
        "models": models,
        "products": products,
        "same_tokens": next((_same_tokens(answers) for answers in decode.values() if answers), {}),
        "machine": _machine(threads, load_average, device, served_by),
        "settings": {
            "repeats": settings.repeats,
            "prompt": PROMPT,
            "new_tokens": new,
            "threads": threads,
            "compiled": settings.compiled,
        },
        "notes": notes,
    }


class _Repeats:
    """Repeats a measurement, alternating between the processes. Writes a note if a model does not support it."""

    def __init__(self, running: dict[str, Process], count: int, notes: list[str]) -> None:
        self.running, self.count, self.notes = running, count, notes
        self.report = processes.progress("  speed: ")

    def ask(self, label: str, name: str, *arguments: Any) -> dict[str, list[Any]] | None:
        """The answers by model, without the first one, which warms up. None if a model fails."""
        answers: dict[str, list[Any]] = {model: [] for model in self.running}
        for repeat in range(self.count + 1):
            self.report(f"{label}, {repeat} of {self.count}")
            for model, process in self.running.items():
                try:
                    answers[model].append(process.ask(name, *arguments))
                except MeasurementError as error:
                    self.notes.append(f"{label} was not measured: {model}: {str(error)[:300]}")
                    return None
        return {model: values[1:] for model, values in answers.items()}


def _new_tokens(models: dict[str, dict], settings: Speed, positions: int | None, notes: list[str]) -> int:
    """The number of tokens to generate; 0 if a model cannot generate or has too few positions."""
    unable = [name for name, model in models.items() if not model.pop("generates")]
    new = settings.new_tokens
    if not settings.batches:
        return 0
    if unable:
        notes.append(f"decoding was not measured: {unable[0]} cannot generate")
        return 0
    if positions and positions <= PROMPT:
        notes.append(f"decoding was not measured: {positions} positions are too few after a prompt of {PROMPT} tokens")
        return 0
    if positions and positions < PROMPT + new:
        notes.append(f"{positions - PROMPT} tokens are generated, not {new}: the model has {positions} positions")
        return positions - PROMPT
    return new


def _same_tokens(answers: dict[str, list]) -> dict[str, float]:
    """For each model but the first, the share of generated tokens that equal the first model's."""
    first, *others = ((name, values[0][1]) for name, values in answers.items())
    return {name: sum(map(int.__eq__, tokens, first[1])) / len(tokens) for name, tokens in others}


def _products(repeats: _Repeats) -> list[dict[str, Any]]:
    """The median microseconds of one product in each model, by shape and number of tokens, for the shapes that all have."""
    rows = []
    for tokens in PRODUCT_TOKENS:
        answers = repeats.ask(f"products with {tokens} tokens", "products", tokens)
        if answers is None:
            break
        first, *others = (values[0] for values in answers.values())
        for shape, (count, _) in first.items():
            if all(shape in other for other in others):
                medians = {
                    name: 1e6
                    * statistics.median(seconds / matrices for matrices, seconds in (timed[shape] for timed in values))
                    for name, values in answers.items()
                }
                rows.append({"shape": shape, "matrices": count, "tokens": tokens, "microseconds": medians})
    return sorted(rows, key=lambda row: list(map(int, row["shape"].split(" x "))))


def _clipped(lengths: list[int], positions: int | None, notes: list[str]) -> list[int]:
    if positions and any(length > positions for length in lengths):
        notes.append(f"prompts are cut to the model's {positions} positions")
        lengths = [min(length, positions) for length in lengths]
    return sorted(set(lengths))


def _rates(tokens: int, seconds: list[float]) -> dict[str, Any]:
    values = [tokens / value for value in seconds]
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": values}


def _device(settings: Speed) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("speed.device=cuda, but there is no GPU here: set speed.device=auto")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    if settings.compiled and device == "cuda":
        raise UserError("speed.compiled is for the CPU: set speed.device=cpu")
    return device


def _machine(threads: int, load_average: float, device: str, served_by: str | None) -> dict[str, Any]:
    return {
        "device": device,
        "hardware": hardware.machine(),
        "flags": sorted(set(FLAGS) & kernels.cpu_flags()),
        "kernels": served_by or None,
        "threads": threads,
        "torch": torch.__version__,
        "load": round(load_average, 1),  # before the measurement
    }

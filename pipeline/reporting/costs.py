"""What the stages export and speed found, as table rows and sentences of plain text; of `speed.measure`'s dict."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.reporting.summary import get
from pipeline.runtime import files

MIB = 2**20
RUN = ("ordinary", "compact")  # the models of a run
BATCH = "1"  # of the decode speed in headlines and comparisons
Table = tuple[list[str], list[list[str]]]  # header and rows
EXPLAINED = (
    "Tokens per second: the median of the repeats, in brackets the least and the most; ×: the median of the ratios, turn by "
    "turn. Decoding is greedy generation with a cache, the prompt of {prompt} tokens included. Memory: by how much the process "
    "grew."
)


class Measure(NamedTuple):
    label: str
    values: list[list[float]]  # of each model; several are turns
    more_is_better: bool = False

    def ratios(self) -> list[list[float]]:
        """Of each model but the first to the first, turn by turn: what slows a machine for a while slows all."""
        first, *others = self.values
        return [[one / other for one, other in zip(it, first, strict=True)] for it in others]


def read(inputs: dict[str, Path]) -> tuple[dict | None, dict | None]:
    """What the stages export and speed wrote, by the folders of the stages that a run has."""
    wanted = {"export": "sizes.json", "speed": "results.json"}
    sizes, speed = (
        files.read_json(inputs[stage] / file) if stage in inputs else None for stage, file in wanted.items()
    )
    return sizes, speed


def measures(sizes: dict | None, speed: dict | None) -> list[Measure]:
    """All that was measured of all models; of a run, "ordinary" and "compact"."""
    found = []
    if sizes:
        found.append(Measure("pruned matrices, MiB", [[it / MIB] for it in sizes["matrix_bytes"].values()]))
        found.append(Measure("all weights on disk, MiB", [[it / MIB] for it in sizes["file_bytes"].values()]))
    models = list(speed["models"].values()) if speed else []
    if models:
        if not sizes:
            found.append(Measure("weights on disk, MiB", [[it["file_bytes"] / MIB] for it in models]))
        found.append(Measure("memory, MiB", [[it["memory_bytes"] / MIB] for it in models]))
        found.append(Measure("load, s", [[it["load_seconds"]] for it in models]))
        found.append(Measure("load and first token, s", [[it["first_token_seconds"]] for it in models]))
        for length in models[0]["prefill"]:
            rates = [it["prefill"][length]["all"] for it in models]
            found.append(Measure(f"prefill of {length}, tokens/s", rates, more_is_better=True))
        for batch in models[0]["decode"]:
            rates = [it["decode"][batch]["all"] for it in models]
            found.append(Measure(f"decode, batch {batch}, tokens/s", rates, more_is_better=True))
    return found


def table(sizes: dict | None, speed: dict | None, heads: tuple[str, ...] = RUN, spread: bool = True) -> Table:
    """A row for each measure, a column for each model, and for each but the first its ratio to the first; with `spread`, the
    least and the most in brackets."""
    rows = []
    for it in measures(sizes, speed):
        cells = [_spread(values, _number, spread) for values in it.values]
        rows.append([it.label, *cells, *(_spread(values, "{:.2f}".format, spread, "×") for values in it.ratios())])
    return ["", *heads, *(f"{head} / {heads[0]}" for head in heads[1:])], rows


def products(speed: dict, heads: tuple[str, ...] = RUN) -> Table:
    """Microseconds of one product by shape of the matrix and number of tokens, and how many times as fast the others are."""
    rows = []
    for it in speed["products"]:
        first, *others = it["microseconds"].values()
        cells = [f"{value:,.1f}" for value in (first, *others)]
        gains = [_times(first / value) for value in others]
        rows.append([it["shape"], str(it["matrices"]), str(it["tokens"]), *cells, *gains])
    gains = [f"gain of {head}" for head in heads[1:]]
    return ["matrix (out x in)", "matrices", "tokens", *(f"{head}, µs" for head in heads), *gains], rows


def circumstances(speed: dict) -> list[str]:
    """Two paragraphs: where it was measured and what was not, and what the figures mean."""
    machine, settings = speed["machine"], speed["settings"]
    kernels = f"kernels for {machine['kernels']}" if machine["kernels"] else "no kernels for compact matrices"
    where = (
        f"Measured on {machine['hardware']} ({', '.join(machine['flags']) or 'no known instructions'}; {kernels}), "
        f"{threads(speed)}, torch {machine['torch']}, load of the machine before: {machine['load']:g}; {settings['repeats']} "
        "repeats."
    )
    meaning = EXPLAINED.format(prompt=settings["prompt"])
    first = next(iter(speed["models"]))
    for name, share in speed["same_tokens"].items():
        meaning += f" Of {settings['new_tokens']} tokens that {name} generates, {share:.0%} are those of {first}."
    return [" ".join([where, *(f"{note[0].upper()}{note[1:]}." for note in speed["notes"])]), meaning]


def headline(sizes: dict | None, speed: dict | None) -> str:
    """What became smaller and faster, or slower: one sentence; nothing where neither stage ran."""
    parts = []
    if sizes:
        parts.append(f"{_times(size_ratio(sizes))} the bytes of the ordinary one")
    if (gain := speed_ratio(speed)) is not None:
        slower = " (slower)" if round(gain, 2) < 1 else ""
        parts.append(f"{_times(gain)} its decode speed{slower} at batch {BATCH} on {threads(speed)} of the CPU")
    return f"The compact folder has {' and '.join(parts)}." if parts else ""


def size_ratio(sizes: dict) -> float:
    """Compact to ordinary, of all weight files."""
    return sizes["file_bytes"]["compact"] / sizes["file_bytes"]["ordinary"]


def speed_ratio(speed: dict | None) -> float | None:
    """Compact to ordinary, decoding at batch 1; None where that was not measured."""
    rates = [get(speed, "models", name, "decode", BATCH, "all") for name in RUN]
    return statistics.median(Measure("", rates).ratios()[0]) if all(rates) else None


def threads(speed: dict) -> str:
    count = speed["machine"]["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def _spread(values: list[float], form: Callable[[float], str], with_ends: bool, unit: str = "") -> str:
    text = form(statistics.median(values)) + unit
    return f"{text} ({form(min(values))}–{form(max(values))})" if with_ends and len(values) > 1 else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"

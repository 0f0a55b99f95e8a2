"""The results of the stages export and speed as table rows and sentences. `speed` is the dict that `speed.measure` returns."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.reporting.summary import get
from pipeline.runtime import files

MIB = 2**20
RUN = ("ordinary", "compact")  # the models that a run measures
FORMS = ("bitmask", "semi-structured", "dense")  # of `Forms.table`
BATCH = "1"  # the batch size of the decode speed in headlines and comparisons
Table = tuple[list[str], list[list[str]]]  # header and rows
EXPLAINED = (
    "Tokens per second: the median of the repeats, with the least and the most in brackets; ×: the median of the ratios within "
    "each repeat. Decoding is greedy generation with a cache, including the prompt of {prompt} tokens. Memory: {memory}."
)
MEMORY = {
    "cpu": "the growth of the process",
    "cuda": "the most that is allocated on the GPU for one token; products: the GPU's own time, without launches",
}


class Measure(NamedTuple):
    label: str
    values: list[list[float]]  # by model, then by repeat
    more_is_better: bool = False

    def ratios(self) -> list[list[float]]:
        """For each model but the first, the ratios to the first model within each repeat: a slow phase of the machine affects
        these least."""
        first, *others = self.values
        return [[value / reference for value, reference in zip(other, first, strict=True)] for other in others]


def read(inputs: dict[str, Path]) -> tuple[dict | None, dict | None]:
    """(sizes, speed), as the stages export and speed wrote them. `inputs`: the folders of the run's stages."""
    paths = {"export": "sizes.json", "speed": "results.json"}
    sizes, speed = (files.read_json(inputs[stage] / file) if stage in inputs else None for stage, file in paths.items())
    return sizes, speed


def measures(sizes: dict | None, speed: dict | None) -> list[Measure]:
    """All measured quantities, each with the values of all models."""
    measured = []
    if sizes:
        measured.append(Measure("pruned matrices, MiB", [[size / MIB] for size in sizes["matrix_bytes"].values()]))
        measured.append(Measure("all weights on disk, MiB", [[size / MIB] for size in sizes["file_bytes"].values()]))
    models = list(speed["models"].values()) if speed else []
    if models:
        if not sizes:
            measured.append(Measure("weights on disk, MiB", [[model["file_bytes"] / MIB] for model in models]))
        measured.append(Measure("memory, MiB", [[model["memory_bytes"] / MIB] for model in models]))
        measured.append(Measure("load, s", [[model["load_seconds"]] for model in models]))
        measured.append(Measure("load and first token, s", [[model["first_token_seconds"]] for model in models]))
        for kind, label in (("prefill", "prefill of {}, tokens/s"), ("decode", "decode, batch {}, tokens/s")):
            for size in models[0][kind]:
                rates = [model[kind][size]["all"] for model in models]
                measured.append(Measure(label.format(size), rates, more_is_better=True))
    return measured


def table(sizes: dict | None, speed: dict | None, heads: tuple[str, ...] = RUN, spread: bool = True) -> Table:
    """A row for each measure. The columns are the models, then the ratios of all others to the first. `spread`: also shows the
    least and the most, in brackets."""
    rows = []
    for measure in measures(sizes, speed):
        cells = [_spread(values, _number, spread) for values in measure.values]
        ratios = [_spread(values, "{:.2f}".format, spread, "×") for values in measure.ratios()]
        rows.append([measure.label, *cells, *ratios])
    return ["", *heads, *(f"{head} / {heads[0]}" for head in heads[1:])], rows


def products(speed: dict, heads: tuple[str, ...] = RUN) -> Table:
    """Microseconds of one product by matrix shape and number of tokens, and the gains of the other models over the first."""
    rows = []
    for product in speed["products"]:
        first, *others = product["microseconds"].values()
        cells = [f"{value:,.1f}" for value in (first, *others)]
        gains = [_times(first / value) for value in others]
        rows.append([product["shape"], str(product["matrices"]), str(product["tokens"]), *cells, *gains])
    gains = [f"gain of {head}" for head in heads[1:]]
    return ["matrix (out x in)", "matrices", "tokens", *(f"{head}, µs" for head in heads), *gains], rows


def circumstances(speed: dict) -> list[str]:
    """Two paragraphs: the machine and the notes, and what the figures mean."""
    machine, settings = speed["machine"], speed["settings"]
    kernels = (
        f"kernels {'of' if on_gpu(speed) else 'for'} {machine['kernels']}"
        if machine["kernels"]
        else "no kernels for compact matrices"
    )
    instructions = ", ".join(machine["flags"]) or "no known instructions"
    where = "on its GPU" if on_gpu(speed) else instructions
    conditions = (
        f"Measured on {machine['hardware']} ({where}; {kernels}), "
        f"{threads(speed)}, torch {machine['torch']}, load average before: {machine['load']:g}; {settings['repeats']} repeats"
        + ("; decoding compiled." if settings.get("compiled") else ".")
    )
    meaning = EXPLAINED.format(prompt=settings["prompt"], memory=MEMORY["cuda" if on_gpu(speed) else "cpu"])
    first = next(iter(speed["models"]))
    for name, share in speed["same_tokens"].items():
        meaning += f" Of {settings['new_tokens']} tokens that {name} generates, {share:.0%} equal those of {first}."
    return [" ".join([conditions, *(f"{note[0].upper()}{note[1:]}." for note in speed["notes"])]), meaning]


def headline(sizes: dict | None, speed: dict | None) -> str:
    """One sentence on the gain or loss in size and speed; empty if neither stage ran."""
    parts = []
    if sizes:
        parts.append(f"{_times(size_ratio(sizes))} the bytes of the ordinary one")
    if (gain := speed_ratio(speed)) is not None:
        slower = " (slower)" if round(gain, 2) < 1 else ""
        parts.append(f"{_times(gain)} its decode speed{slower} at batch {BATCH} on {_place(speed)}")
    return f"The compact folder has {' and '.join(parts)}." if parts else ""


def size_ratio(sizes: dict) -> float:
    """The compact folder's weight bytes relative to the ordinary folder's."""
    return sizes["file_bytes"]["compact"] / sizes["file_bytes"]["ordinary"]


def speed_ratio(speed: dict | None) -> float | None:
    """The compact model's decode speed at batch 1 relative to the ordinary model's; None if it was not measured."""
    rates = [get(speed, "models", name, "decode", BATCH, "all") for name in RUN]
    return statistics.median(Measure("", rates).ratios()[0]) if all(rates) else None


def forms(speed: dict) -> Table:
    """How a GPU holds the pruned matrices of each kind, with the microseconds of a product in each form; empty on a CPU."""
    rows = []
    kinds = [kind for model in speed["models"].values() for kind in model.get("forms", [])]
    for kind in kinds:
        times = {
            form: ", ".join(f"{value:,.1f}" for value in by_tokens.values())
            for form, by_tokens in kind["microseconds"].items()
        }
        tokens = ", ".join(map(str, next(iter(kind["microseconds"].values()), {})))
        about = [kind["shape"], str(kind["matrices"]), f"{kind['dtype']}, {kind['pattern']}", kind["form"], tokens]
        rows.append([*about, *(times.get(form, "–") for form in FORMS)])
    return (
        ["matrix (out x in)", "matrices", "weights", "form", "tokens", *(f"{form}, µs" for form in FORMS)]
        if rows
        else []
    ), rows


def on_gpu(speed: dict) -> bool:
    return speed["machine"].get("device") == "cuda"


def _place(speed: dict) -> str:
    return "the GPU" if on_gpu(speed) else f"{threads(speed)} of the CPU"


def threads(speed: dict) -> str:
    count = speed["machine"]["threads"]
    return f"{count} thread{'s' * (count > 1)}"


def _spread(values: list[float], number: Callable[[float], str], with_range: bool, unit: str = "") -> str:
    text = number(statistics.median(values)) + unit
    return f"{text} ({number(min(values))}–{number(max(values))})" if with_range and len(values) > 1 else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"

"""The report's pictures: numbers in, an inline SVG string out."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.reporting.series import Panel, Points
from pipeline.reporting.svg import ACCENT, INK, SECOND, SERIES, SIZE, draw

MARKERS = "os^Dv"
DENSE = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
POINTS = 300  # a loss curve holds no more points than it has pixels


def sparsity(series: dict[str, Points]) -> str:
    """By type of matrix, (layer, share of its weights that is pruned, 0..1)."""
    return _panels("sparsity", series, "pruned weights (%)", 1)


def output_error(series: dict[str, Points]) -> str:
    """By type of matrix, (layer, ||pruned - dense|| / ||dense|| of its outputs)."""
    top = 1.1 * max(error for points in series.values() for _, error in points)
    return _panels("output_error", series, "output error (% of the norm)", top or 1)


def _panels(name: str, series: dict[str, Points], label: str, top: float) -> str:
    """A panel for each series, all on the same axes; shares are drawn in percent."""
    across = next(width for width, most in ((1, 1), (2, 4), (3, 9), (4, math.inf)) if len(series) <= most)
    down = math.ceil(len(series) / across)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(series))
            axes.tick_params(labelbottom=place + across >= len(series))
        for axes, (title, points) in zip(grid.flat, series.items()):
            layers, shares = zip(*points, strict=True)
            percent = [100 * share for share in shares]
            axes.fill_between(layers, percent, color=ACCENT, alpha=0.15, linewidth=0)
            axes.plot(layers, percent, color=ACCENT, linewidth=1.4, **_dots(points))
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(4 if across > 1 else 8, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(False, axis="x")
        grid[0, 0].set_ylim(0, 100 * top)
        figure.supxlabel("decoder layer", fontsize="medium")
        figure.supylabel(label, fontsize="medium")

    return draw(name, paint, (SIZE[0], max(SIZE[1], 0.6 + 0.95 * down)))


def reconstruction(before: Points, after: Points) -> str:
    """(layer, ||reconstructed - dense|| / ||dense|| of its output, over held-out calibration text)."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for label, points, colour in (("before", before, SECOND), ("after", after, ACCENT)):
            layers, shares = zip(*points, strict=True)
            axes.plot(
                layers, [100 * share for share in shares], color=colour, linewidth=1.4, label=label, **_dots(points)
            )
        axes.set(xlabel="decoder layer", ylabel="output error (% of the norm)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(False, axis="x")
        axes.legend(loc="best")

    return draw("reconstruction", paint)


def loss(training: Points, validation: Points = ()) -> str:
    """`training` and `validation` are (step, nats per token); the solid line is a running mean of the faint one."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps, values = _thinned(np.array(training, dtype=float).reshape(-1, 2)).T
        window = max(1, len(values) // 20)
        axes.plot(steps, values, color=ACCENT, linewidth=1, alpha=0.4 if window > 1 else 1)
        if window > 1:
            kernel = np.ones(window)  # shorter at the ends, where there is less to average
            mean = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
            axes.plot(steps, mean, color=ACCENT, linewidth=1.8, label="training, running mean")
        if validation:
            steps, values = zip(*validation, strict=True)
            axes.plot(steps, values, color=SECOND, linewidth=1.4, label="validation", **_dots(validation))
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if window > 1 or validation:
            axes.legend(loc="best")

    return draw("loss", paint)


def stages(names: list[str], seconds: list[float], times: list[str], gib: list[float | None]) -> str:
    """Lying bars, the first stage on top; `times` are told at their ends. Memory is left out where one is unknown."""
    unit, divisor = next((u, d) for u, d in (("h", 3600), ("min", 60), ("s", 1)) if max(seconds) >= 2 * d or d == 1)
    sides = [(f"time ({unit})", [value / divisor for value in seconds], times)]
    sides += [("peak memory (GiB)", gib, [f"{value:.2g}" for value in gib])] if None not in gib else []

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(sides), sharey=True, squeeze=False)
        for axes, (label, values, texts) in zip(grid.flat, sides):
            axes.bar_label(axes.barh(names, values, height=0.6, color=ACCENT), texts, padding=4)
            axes.set(xlabel=label)
            axes.margins(x=0.08 * max(map(len, texts)))  # room for the label of the longest bar
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(False, axis="y")
        grid[0, 0].invert_yaxis()

    return draw("stages", paint)


def comparison(panels: list[Panel]) -> str:
    """By pattern, what each method leaves (hollow) and what healing makes of it (filled), with standard errors."""
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    methods = list(dict.fromkeys(mark.method for panel in panels for mark in panel.marks))
    healings = list(dict.fromkeys(mark.healing for panel in panels for mark in panel.marks))

    def paint(figure: Figure) -> None:
        grid = figure.subplots(down, across, squeeze=False)
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(panels))
        for axes, panel in zip(grid.flat, panels):
            _compare(axes, panel, methods, healings)
            if len(panels) > 1:
                axes.set_title(panel.title)
        handles = [Line2D([], [], **DENSE, label="dense")]
        handles += [Line2D([], [], color=_colour(it, methods), linewidth=3, label=it) for it in methods]
        for healing in healings:
            told = {**_marker(healing, healings, INK), "color": INK, "linestyle": ""}
            handles.append(Line2D([], [], **told, label=healing.strip() or "pruned"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)

    rows = math.ceil((1 + len(methods) + len(healings)) / 3)
    return draw("comparison", paint, (SIZE[0] * across, SIZE[1] * down + 0.2 * rows))


def _compare(axes: Axes, panel: Panel, methods: list[str], healings: list[str]) -> None:
    for mark in panel.marks:
        place, healed = methods.index(mark.method), healings.index(mark.healing)
        # one method's marks stand together, beside each other so that their errors are seen
        aside = 0.75 * ((place + (healed + 1) / (len(healings) + 1)) / len(methods) - 0.5)
        x = [panel.patterns.index(pattern) + aside for pattern in mark.numbers]
        y, errors = zip(*mark.numbers.values(), strict=True)
        colour = _colour(mark.method, methods)
        look = _marker(mark.healing, healings, colour)
        axes.errorbar(x, y, [error or 0 for error in errors], linestyle="", linewidth=1.2, color=colour, **look)
    if panel.dense:
        axes.axhline(panel.dense[0], **DENSE)
    values = [number[0] for mark in panel.marks for number in mark.numbers.values()]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(panel.patterns)), panel.patterns)
    axes.set_xlim(-0.5, len(panel.patterns) - 0.5)
    axes.grid(False, axis="x")


def _colour(method: str, methods: list[str]) -> str:
    return SERIES[methods.index(method) % len(SERIES)]


def _marker(healing: str, healings: list[str], colour: str) -> dict:
    """What healed has a shape of its own and is filled."""
    shape = MARKERS[healings.index(healing) % len(MARKERS)]
    return {"marker": shape, "markersize": 5, "markerfacecolor": colour if healing else "none"}


def _thinned(points: np.ndarray) -> np.ndarray:
    """(n, 2) -> at most (POINTS, 2): means of neighbours."""
    return np.stack([part.mean(0) for part in np.array_split(points, min(POINTS, len(points)))])


def _dots(points: Points) -> dict:
    """Each point is marked while they stand apart."""
    return {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}

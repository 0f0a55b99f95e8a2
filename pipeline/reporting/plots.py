"""The report's pictures: numbers in, an SVG document out. The same numbers give the same bytes.

Pages show them as images, so each is a document of its own. Figures are made without pyplot: no display is needed.
"""

import functools
import io
import math
import textwrap
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, LINE, ACCENT, SECOND = "#1e2822", "#c9d3cb", "#2f7d4f", "#b3661a"
SERIES = (ACCENT, SECOND, "#2b6ca8", "#93458a", "#857414", "#5c6b73")  # distinct for the colour-blind with MARKERS
MARKERS = "os^Dv"
SIZE = (4.4, 2.75)  # inches of 72 px; two fit side by side on a laptop
LABEL = 44  # characters of a row's label on one line; a path of the user's can have more
POINTS = 300  # a loss curve has no more points than pixels
STYLE = {
    "svg.fonttype": "none",  # text stays text: a small file
    "svg.hashsalt": "espalier",  # ids do not depend on time
    "text.parse_math": False,  # names from outside may hold a $
    "font.size": 9.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def picture(draw: Callable[..., None]) -> Callable[..., str]:
    """Makes a function that draws on a figure one that returns SVG; `background` is a colour."""

    @functools.wraps(draw)
    def drawn(*args, background: str = "none") -> str:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # the user's matplotlibrc does not count
            matplotlib.rcParams.update(STYLE)
            figure, file = Figure(figsize=SIZE, layout="constrained"), io.StringIO()
            draw(figure, *args)
            figure.savefig(file, format="svg", facecolor=background, metadata={"Date": None})
        return file.getvalue()

    return drawn


@picture
def by_layer(figure: Figure, shares: pd.DataFrame, label: str, top: float) -> None:
    """A panel for each column, all on the same axes: shares by layer, drawn in percent up to `top`."""
    count = shares.shape[1]
    across = next(width for width, most in ((1, 1), (2, 4), (3, 9), (4, math.inf)) if count <= most)
    down = math.ceil(count / across)
    figure.set_size_inches(SIZE[0], max(SIZE[1], 0.6 + 0.95 * down))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False, subplot_kw={"ylim": (0, top)})
    for place, axes in enumerate(panels.flat):
        axes.set_visible(place < count)
        axes.tick_params(labelbottom=place + across >= count)
    for axes, (title, column) in zip(panels.flat, shares.items()):
        line = _line(axes, 100 * column.dropna(), ACCENT)
        axes.fill_between(*line.get_data(), color=ACCENT, alpha=0.15, linewidth=0)
        axes.set_title(title)
        _layers(axes, 4 if across > 1 else 8)
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel(label, fontsize="medium")


@picture
def by_class(figure: Figure, accuracy: pd.DataFrame) -> None:
    """A line for each class (row), from the least to the highest accuracy, with a mark for each model (column)."""
    figure.set_size_inches(SIZE[0], max(SIZE[1], 0.9 + 0.2 * len(accuracy)))
    axes, places = figure.add_subplot(xlabel="accuracy (%)"), range(len(accuracy))
    axes.hlines(places, 100 * accuracy.min(axis=1), 100 * accuracy.max(axis=1), color=LINE, linewidth=3)
    for number, (model, shares) in enumerate(accuracy.items()):
        look = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(100 * shares.to_numpy(), places, linestyle="", markersize=5, alpha=0.85, label=model, **look)
    axes.set_yticks(places, [label if len(label) <= 24 else f"{label[:23]}…" for label in accuracy.index.astype(str)])
    axes.grid(False, axis="y")
    axes.margins(y=0.6 / len(accuracy))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=accuracy.shape[1])


@picture
def reconstruction(figure: Figure, before: pd.Series, after: pd.Series) -> None:
    """||reconstructed - dense|| / ||dense|| of a layer's output on held-out calibration text, by layer."""
    axes = figure.add_subplot(xlabel="layer", ylabel="output error (% of the norm)")
    _line(axes, 100 * before, SECOND, "before")
    _line(axes, 100 * after, ACCENT, "after")
    axes.set_ylim(bottom=0)
    _layers(axes, 8)
    axes.legend()


@picture
def loss(figure: Figure, training: pd.Series, validation: pd.Series) -> None:
    """Nats per token by step; the solid line is a running mean of the faint one."""
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats)")
    places = np.arange(len(training)) // math.ceil(len(training) / POINTS)
    thinned = training.reset_index().groupby(places).mean().set_index(training.index.name)[training.name]
    window = max(1, len(thinned) // 20)
    axes.plot(thinned, color=ACCENT, linewidth=1, alpha=0.4 if window > 1 else 1)
    if window > 1:
        mean = thinned.rolling(window, center=True, min_periods=1).mean()
        axes.plot(mean, color=ACCENT, linewidth=1.8, label="training, running mean")
    if len(validation):
        _line(axes, validation, SECOND, "validation")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


@picture
def stages(figure: Figure, names: list[str], seconds: list[float], times: list[str], gib: list[float | None]) -> None:
    """Bars, the first stage on top, labelled with `times`. Memory is left out where one is unknown."""
    unit, divisor = next((u, d) for u, d in (("h", 3600), ("min", 60), ("s", 1)) if max(seconds) >= 2 * d or d == 1)
    sides = [(f"time ({unit})", [value / divisor for value in seconds], times)]
    sides += [("peak memory (GiB)", gib, [f"{value:.2g}" for value in gib])] if None not in gib else []
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)
    for axes, (label, values, texts) in zip(panels.flat, sides):
        axes.bar_label(axes.barh(names, values, height=0.6, color=ACCENT), texts, padding=4)
        axes.set_xlabel(label)
        axes.margins(x=0.08 * max(map(len, texts)))  # room for the label of the longest bar
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(False, axis="y")
    panels[0, 0].invert_yaxis()


@picture
def ratios(figure: Figure, rows: list[tuple[str, list[float], bool]]) -> None:
    """A bar from 1 for each (label, ratios, whether more is better): medians, with the least and the most."""
    figure.set_size_inches(SIZE[0], max(SIZE[1], 0.6 + 0.26 * len(rows)))
    axes = figure.add_subplot(xlabel="× of the ordinary model (brown: worse)")
    for place, (_, values, more_is_better) in enumerate(rows):
        middle = float(np.median(values))
        colour = ACCENT if (middle >= 1) == more_is_better or middle == 1 else SECOND
        ends = [[middle - min(values)], [max(values) - middle]]
        bars = axes.barh(place, middle - 1, left=1, xerr=ends, height=0.6, color=colour, ecolor=INK)
        axes.bar_label(bars, [f"{middle:.2f}"], padding=4)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.margins(x=0.25)
    axes.grid(False, axis="y")
    axes.invert_yaxis()


@picture
def comparison(figure: Figure, panels: list[tuple[str, pd.DataFrame]]) -> None:
    """A panel for each measure, a line for each row of its table; of a frame as `compare.tabulate` makes it."""
    panels = [(title, part.assign(label=part.label.map(_wrapped))) for title, part in panels]
    names = [part.label.unique() for _, part in panels]
    heights = [0.9 + 0.12 * len(labels) + 0.16 * sum(label.count("\n") + 1 for label in labels) for labels in names]
    figure.set_size_inches(2 * SIZE[0], sum(heights) + 0.3)
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for axes, (title, part) in zip(grid.flat, panels):
        finite = part[np.isfinite(part.value)]
        for value in finite.value[~finite.is_sparse][:1]:
            axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
        sparse = finite[finite.is_sparse]
        for place, (pattern, points) in enumerate(sparse.groupby("pattern", sort=False)):
            look = {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
            errors = points.error.astype(float).fillna(0)
            axes.errorbar(points.value, points.label, xerr=errors, linestyle="", linewidth=1.2, label=pattern, **look)
        if len(sparse) and finite.value.min() > 0 and finite.value.max() > 8 * finite.value.min():
            axes.set_xscale("log")
            _logarithmic(axes.xaxis)
        axes.margins(y=0.5 / max(1, sparse.label.nunique()))
        axes.invert_yaxis()
        axes.set_title(title)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper right", ncols=6)


@picture
def quality_and_speed(figure: Figure, panels: list[tuple[str, pd.DataFrame]]) -> None:
    """A panel for each (title, frame of `compare`): perplexity against the decode speed relative to the dense model's."""
    figure.set_size_inches(2 * SIZE[0], SIZE[1] * len(panels) + 0.3)
    grid = figure.subplots(len(panels), squeeze=False)
    labels = list(dict.fromkeys(label for _, part in panels for label in part.label[part.is_sparse]))
    patterns = list(dict.fromkeys(pattern for _, part in panels for pattern in part.pattern))
    for axes, (title, part) in zip(grid.flat, panels):
        for value in part.perplexity[~part.is_sparse][:1]:
            axes.plot(1, value, "*", color=INK, markersize=9, label="dense")
        for (label, pattern), points in part[part.is_sparse].groupby(["label", "pattern"], sort=False):
            colour = SERIES[patterns.index(pattern) % len(SERIES)]
            marker = MARKERS[labels.index(label) % len(MARKERS)]
            axes.plot(points.speed, points.perplexity, marker, color=colour, label=_wrapped(f"{label}, {pattern}"))
        if part.perplexity.max() > 8 * part.perplexity.min() > 0:
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)
        axes.margins(0.15)
        axes.set(title=title, xlabel="decode speed, × of the dense model", ylabel="perplexity")
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper")


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LABEL, break_on_hyphens=False)


def _logarithmic(axis: Axis) -> None:
    """Plain numbers at 1, 2, 5, 10: matplotlib's own ticks are math, which is not parsed here."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_locator(NullLocator())


def _line(axes: Axes, points: pd.Series, colour: str, label: str | None = None) -> Line2D:
    """Points are marked where they are few."""
    dots = {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
    return axes.plot(points, color=colour, linewidth=1.4, label=label, **dots)[0]


def _layers(axes: Axes, ticks: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(False, axis="x")

"""The report's pictures: numbers in, an inline SVG string out.

Figures are made without pyplot: no display is needed and none stays open. Colours are CSS variables of the page
(with a light fallback), so one picture serves the light scheme, the dark one and print.
"""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, LINE, ACCENT, SECOND = "#1e2822", "#dce4dc", "#2f7d4f", "#b3661a"
VARIABLES = {INK: "ink", LINE: "line", ACCENT: "accent", SECOND: "second"}
SIZE = (4.4, 2.75)  # inches at 72 px; two stand side by side on a laptop, and text of 9.5 px survives a phone
Points = Sequence[tuple[float, float]]  # (x, y)
POINTS = 300  # a loss curve holds no more points than it has pixels
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def layer_sparsity(points: Points) -> str:
    """(layer, share of its weights that is pruned, 0..1)."""

    def draw(axes: Axes) -> None:
        axes.bar(*zip(*points, strict=True), width=0.72, color=ACCENT)
        axes.set(ylim=(0, 1), xlabel="decoder layer", ylabel="pruned weights (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
        _whole_numbers(axes)

    return _svg("layer_sparsity", draw)


def layer_error(points: Points) -> str:
    """(layer, ||pruned - dense|| / ||dense|| of its matrices' outputs), no unit."""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.4, **_dots(points))
        axes.set(xlabel="decoder layer", ylabel="relative output error (ratio)")
        axes.set_ylim(0, 1.1 * max(error for _, error in points) or 1)
        _whole_numbers(axes)

    return _svg("layer_error", draw)


def loss(training: Points, validation: Points = ()) -> str:
    """`training` and `validation` are (step, nats per token); the solid line is a running mean of the faint one."""

    def draw(axes: Axes) -> None:
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

    return _svg("loss", draw)


def stage_times(stages: Sequence[tuple[str, float, str]]) -> str:
    """(name, seconds, label such as `3 min 20 s`): lying bars, the first stage on top."""
    names, seconds, labels = zip(*stages, strict=True)
    unit, divisor = next((u, d) for u, d in (("h", 3600), ("min", 60), ("s", 1)) if max(seconds) >= 2 * d or d == 1)

    def draw(axes: Axes) -> None:
        bars = axes.barh(names, [value / divisor for value in seconds], height=0.6, color=ACCENT)
        axes.bar_label(bars, labels, padding=4)
        axes.set(xlabel=f"wall-clock time ({unit})")
        axes.margins(x=0.24)  # room for the longest bar's label
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.grid(False, axis="y")

    return _svg("stage_times", draw)


def _thinned(points: np.ndarray) -> np.ndarray:
    """(n, 2) -> at most (POINTS, 2): means of neighbours."""
    return np.stack([part.mean(0) for part in np.array_split(points, min(POINTS, len(points)))])


def _dots(points: Points) -> dict:
    """Each point is marked while they stand apart."""
    return {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.grid(False, axis="x")


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """The same numbers give the same bytes: own salt for ids, no date, nobody's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prolog inside HTML
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg, count=3)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1... would be twice in one page
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's font
    # matplotlib's own style element would hold for the whole page
    style = re.search(r"<defs>\s*<style[^>]*>\*{(.*?)}</style>\s*</defs>", svg)
    svg = svg.replace(style[0], "").replace("<svg", f'<svg style="{style[1]}"', 1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg.strip()

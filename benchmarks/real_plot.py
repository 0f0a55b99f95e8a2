"""The plot of benchmarks/real.py: quality against time, so that one sees what the next minute buys."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HIGHEST = 10  # times the dense perplexity: what is above is of no use, and would flatten the rest


def plot(points: dict[str, list[tuple[str, float, float]]], dense: float, path: Path) -> None:
    """One panel for each pattern, with points (method, minutes, perplexity). The line joins the methods that none of the others
    beats in both."""
    points = {
        pattern: sorted((point for point in found if point[2] < HIGHEST * dense), key=lambda point: point[1:])
        for pattern, found in points.items()
    }
    points = {pattern: shown for pattern, shown in points.items() if shown}
    if not points:
        return
    columns = min(2, len(points))
    figure, axes = pyplot.subplots(
        math.ceil(len(points) / columns), columns, figsize=(7.5 * columns, 2.3 * len(points)), squeeze=False
    )
    for axis, (pattern, shown) in zip(axes.flat, points.items()):
        front = []
        for number, (label, minutes, perplexity) in enumerate(shown, 1):
            is_best = not front or perplexity < front[-1][1]
            if is_best:
                front.append((minutes, perplexity))
            axis.plot(minutes, perplexity, "o", color="C0" if is_best else "0.6", label=f"{number}  {label}")
            axis.annotate(str(number), (minutes, perplexity), (5, 4), textcoords="offset points")
        axis.step(*zip(*front), where="post", color="C0", linewidth=1)
        axis.axhline(dense, color="0.4", linestyle=":", linewidth=1)
        axis.annotate("dense", (0, dense), (5, 4), textcoords="offset points", fontsize=8)
        axis.set(title=pattern.replace("of", ":"), xlabel="CPU minutes / 2", ylabel="perplexity", yscale="log")
        axis.set(xlim=(0, 1.3 * max(minutes for _, minutes, _ in shown)), ylim=(0.8 * dense, HIGHEST * dense))
        ticks = [tick for tick in (20, 30, 50, 100, 200) if 0.8 * dense < tick < HIGHEST * dense]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(handlelength=0, markerscale=0, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)

"""The plot of benchmarks/speed.py, from its rows: milliseconds a token against sparsity, and the break-even."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(work: Path, kinds: Iterable[str]) -> None:
    """WORK/speed.png: milliseconds a token at batch 1 against sparsity; prints from which sparsity on compact is faster."""
    rows = [json.loads(line) for line in (work / "speed.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["what"].endswith("batch 1") and row["sparsity"].replace(".", "").isdigit()]
    groups = sorted({(row["model"], row["threads"]) for row in rows})
    figure, axes = pyplot.subplots(1, max(1, len(groups)), figsize=(4.5 * max(1, len(groups)), 4), squeeze=False)
    for (model, threads), axis in zip(groups, axes[0]):
        for kind in kinds:
            found = {float(r["sparsity"]): r["seconds"] for r in rows if (r["model"], r["threads"]) == (model, threads)}
            points = sorted((sparsity, 1e3 * times[kind]) for sparsity, times in found.items() if kind in times)
            if points:
                axis.plot(*zip(*points), marker="o", label=kind)
        for kind in ("torch bf16", "own"):
            gains = sorted((s, t[kind] - t["compact"]) for s, t in found.items() if {kind, "compact"} <= t.keys())
            for (low, loss), (high, gain) in itertools.pairwise(gains):
                if loss < 0 <= gain:
                    even = low - loss * (high - low) / (gain - loss)
                    print(f"{model}, {threads} threads: compact is faster than {kind} from {even:.0%} sparsity on")
            if gains and all(gain >= 0 for _, gain in gains):
                print(
                    f"{model}, {threads} threads: compact is faster than {kind} at every sparsity from {gains[0][0]:.0%} on"
                )
        axis.set(title=f"{model}, {threads} threads", xlabel="sparsity", ylabel="ms a token, batch 1", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(work / "speed.png", dpi=120)

"""The registry of `prune.method`."""

from dataclasses import dataclass
from typing import Any

from pipeline.registry.entry import NONE, Citation, Entry, Registry
from pipeline.registry.patterns import PATTERNS
from pipeline.registry.refinements import DSNOT
from pipeline.registry.updates import SPARSEGPT

WANDA = Citation(
    "Sun et al.", 2023, "A Simple and Effective Pruning Approach for Large Language Models", "arXiv:2306.11695"
)
HAN = Citation(
    "Han et al.", 2015, "Learning both Weights and Connections for Efficient Neural Networks", "arXiv:1506.02626"
)
RIA = Citation(
    "Zhang et al.",
    2024,
    "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    "ICLR 2024",
)
SCORES, OBS = "pipeline.pruning.score_methods", "pipeline.pruning.obs_methods"


@dataclass(frozen=True)
class PruneEntry(Entry):
    refine: str | None = None  # set if the method is a name for a combination with this refinement
    update: str | None = None  # or with this update
    regroups: bool = True  # supports prune.group
    updates_weights: bool = False  # changes the kept weights itself

    def problem(self, settings: Any) -> str | None:
        if settings.group != "auto" and not self.regroups:
            return f"prune.method={settings.method} does not support prune.group={settings.group}: set prune.group=auto"
        if settings.group != "auto" and not PATTERNS.entry(settings.sparsity).is_ratio:
            return (
                f"prune.group={settings.group} needs a ratio, but prune.sparsity={settings.sparsity} is not one: "
                "set prune.group=auto, or prune.sparsity=0.5"
            )
        if settings.target == "dense" and not self.updates_weights and (self.update or settings.update) == NONE:
            return (
                f"prune.target=dense needs kept weights that are updated, but prune.method={settings.method} with "
                f"prune.update={NONE} leaves them: set prune.update=least_squares, or prune.target=pruned"
            )
        if settings.target == "dense" and settings.group == "layer":
            return (
                "prune.target=dense prunes a layer's matrices one after the other, and prune.group=layer compares them first: "
                "set prune.group=auto, or prune.target=pruned"
            )
        for key, included in (("refine", self.refine), ("update", self.update)):
            if included and (value := getattr(settings, key)) not in (NONE, included):
                return (
                    f"prune.method={settings.method} includes prune.{key}={included}, so prune.{key}={value} is not "
                    f"possible: set another prune.method, or prune.{key}={NONE}"
                )
        return None


PRUNE_METHODS = Registry(
    "prune.method",
    "pipeline.pruning.method:PruneMethod",
    PruneEntry("wanda", "Wanda", "Weight times input norm, compared within each output row", f"{SCORES}:Wanda", WANDA),
    PruneEntry(
        "wanda_variant",
        "Wanda variant",
        "Wanda's score; rows lose an equal share of it instead of an equal number of weights",
        f"{SCORES}:WandaVariant",
        WANDA,
        regroups=False,
    ),
    PruneEntry(
        "magnitude", "magnitude", "The weight alone, compared over the whole matrix", f"{SCORES}:Magnitude", HAN
    ),
    PruneEntry(
        "sparsegpt",
        "SparseGPT",
        "Column by column; later columns compensate each error",
        f"{OBS}:SparseGpt",
        SPARSEGPT,
        ("damp",),
        regroups=False,
        updates_weights=True,
    ),
    PruneEntry("ria", "RIA", "The weight relative to its row and column, times the input norm", f"{SCORES}:Ria", RIA),
    PruneEntry(
        "dsnot", "DSnoT", "Wanda's mask, refined by pruning and regrowing", f"{SCORES}:Wanda", DSNOT, refine="dsnot"
    ),
    PruneEntry(
        "magnitude_seq",
        "magnitude, then OBS",
        "Magnitude's complete mask, then SparseGPT's update",
        f"{SCORES}:Magnitude",
        WANDA,
        ("damp",),
        update="obs",
    ),
    PruneEntry(
        "magnitude_iter",
        "magnitude with OBS",
        "Magnitude's score in SparseGPT's blocks of columns",
        f"{OBS}:MagnitudeIter",
        WANDA,
        ("damp",),
        regroups=False,
        updates_weights=True,
    ),
    PruneEntry(
        "wanda_seq",
        "Wanda, then OBS",
        "Wanda's complete mask, then SparseGPT's update",
        f"{SCORES}:Wanda",
        WANDA,
        ("damp",),
        update="obs",
    ),
    PruneEntry(
        "wanda_iter",
        "Wanda with OBS",
        "Wanda's score in SparseGPT's blocks of columns",
        f"{OBS}:WandaIter",
        WANDA,
        ("damp",),
        regroups=False,
        updates_weights=True,
    ),
)

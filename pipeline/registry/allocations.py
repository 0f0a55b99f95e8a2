"""The registry of `prune.allocation`."""

from dataclasses import dataclass
from typing import Any

from pipeline.registry.entry import Citation, Entry, Registry
from pipeline.registry.patterns import PATTERNS

OWL = Citation(
    "Yin et al.",
    2024,
    "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    "arXiv:2310.05175",
)

ALPHA = Citation(
    "Lu et al.",
    2024,
    "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of LLMs",
    "arXiv:2410.10912",
)


@dataclass(frozen=True)
class AllocationEntry(Entry):
    shares_ratio: bool = True  # each layer gets a different ratio, so prune.sparsity must be a ratio

    def problem(self, settings: Any) -> str | None:
        if self.shares_ratio and not PATTERNS.entry(settings.sparsity).is_ratio:
            return (
                f"prune.allocation={settings.allocation} distributes a ratio over the layers, but prune.sparsity="
                f"{settings.sparsity} is not a ratio: set prune.sparsity=0.5, or another ratio"
            )
        return None


ALLOCATIONS = Registry(
    "prune.allocation",
    "pipeline.pruning.allocation:Allocation",
    AllocationEntry(
        "uniform",
        "uniform",
        "The same pattern in every layer",
        "pipeline.pruning.allocation:Uniform",
        shares_ratio=False,
    ),
    AllocationEntry(
        "owl",
        "OWL",
        "Layers with more outlying scores are pruned less",
        "pipeline.pruning.allocation:Owl",
        OWL,
        ("owl_outliers", "owl_spread"),
    ),
    AllocationEntry(
        "alphapruning",
        "AlphaPruning",
        "Layers whose spectra have lighter tails are pruned more",
        "pipeline.pruning.allocation:AlphaPruning",
        ALPHA,
        ("allocation_spread",),
    ),
    AllocationEntry(
        "layer_error",
        "layer error",
        "Layers whose outputs change more are pruned less",
        "pipeline.pruning.allocation:LayerError",
        None,
        ("allocation_spread",),
    ),
)

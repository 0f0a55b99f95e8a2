"""The registry of `prune.refine`."""

from pipeline.registry.entry import NONE, Citation, Entry, Registry

DSNOT = Citation(
    "Zhang et al.", 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", "arXiv:2310.08915"
)
SPARSE_SWAPS = Citation(
    "Zimmer et al.", 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", "arXiv:2512.10922"
)
PLACE = "pipeline.pruning.refinements"

REFINEMENTS = Registry(
    "prune.refine",
    f"{PLACE}:Refinement",
    Entry(NONE, NONE, "The method's mask", f"{PLACE}:Refinement"),
    Entry("dsnot", "DSnoT", "Weights return where they lessen the expected output error", f"{PLACE}:Dsnot", DSNOT),
    Entry("swaps", "swaps", "Exchanges that lessen the output error most", f"{PLACE}:Swaps", SPARSE_SWAPS, ("swaps",)),
)

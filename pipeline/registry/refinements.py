"""The registry of `prune.refine`."""

from pipeline.registry.entry import NONE, Citation, Entry, Registry

DSNOT = Citation(
    "Zhang et al.", 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", "arXiv:2310.08915"
)
SPARSE_SWAPS = Citation(
    "Zimmer et al.", 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", "arXiv:2512.10922"
)
MODULE = "pipeline.pruning.refinements"

REFINEMENTS = Registry(
    "prune.refine",
    f"{MODULE}:Refinement",
    Entry(NONE, NONE, "The method's mask", f"{MODULE}:Refinement"),
    Entry("dsnot", "DSnoT", "Restores weights that reduce the expected output error", f"{MODULE}:Dsnot", DSNOT),
    Entry("swaps", "swaps", "Exchanges that reduce the output error most", f"{MODULE}:Swaps", SPARSE_SWAPS, ("swaps",)),
)

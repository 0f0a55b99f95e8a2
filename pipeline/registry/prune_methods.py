"""The registry of `prune.method`."""

from pipeline.registry.entry import Citation, Entry, Registry

WANDA = Citation(
    "Sun et al.", 2023, "A Simple and Effective Pruning Approach for Large Language Models", "arXiv:2306.11695"
)
SPARSEGPT = Citation(
    "Frantar & Alistarh",
    2023,
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "arXiv:2301.00774",
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
DSNOT = Citation(
    "Zhang et al.", 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", "arXiv:2310.08915"
)
SCORES, OBS = "pipeline.pruning.score_methods", "pipeline.pruning.obs_methods"


def _obs(name: str, label: str, description: str, implementation: str, citation: Citation = WANDA) -> Entry:
    return Entry(name, label, description, f"{OBS}:{implementation}", citation, ("damp",))


PRUNE_METHODS = Registry(
    "prune.method",
    "pipeline.pruning.method:PruneMethod",
    Entry("wanda", "Wanda", "Weight times input norm, compared within each output row", f"{SCORES}:Wanda", WANDA),
    Entry(
        "wanda_variant",
        "Wanda variant",
        "Wanda's score; rows lose an equal share of it instead of an equal number of weights",
        f"{SCORES}:WandaVariant",
        WANDA,
    ),
    Entry("magnitude", "magnitude", "The weight alone, compared over the whole matrix", f"{SCORES}:Magnitude", HAN),
    _obs(
        "sparsegpt",
        "SparseGPT",
        "Column by column, each error compensated by the later columns",
        "SparseGpt",
        SPARSEGPT,
    ),
    Entry("ria", "RIA", "The weight relative to its row and column, times the input norm", f"{SCORES}:Ria", RIA),
    Entry("dsnot", "DSnoT", "Wanda's mask, refined by pruning and regrowing", f"{SCORES}:Dsnot", DSNOT),
    _obs(
        "magnitude_seq", "magnitude, then OBS", "Magnitude's whole mask first, then SparseGPT's update", "MagnitudeSeq"
    ),
    _obs("magnitude_iter", "magnitude with OBS", "Magnitude's score in SparseGPT's blocks of columns", "MagnitudeIter"),
    _obs("wanda_seq", "Wanda, then OBS", "Wanda's whole mask first, then SparseGPT's update", "WandaSeq"),
    _obs("wanda_iter", "Wanda with OBS", "Wanda's score in SparseGPT's blocks of columns", "WandaIter"),
)

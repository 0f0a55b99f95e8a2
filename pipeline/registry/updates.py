"""The registry of `prune.update`."""

from pipeline.registry.entry import NONE, Citation, Entry, Registry

SPARSEGPT = Citation(
    "Frantar & Alistarh",
    2023,
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "arXiv:2301.00774",
)
ADMM = Citation("Boža", 2024, "Fast and Effective Weight Update for Pruned Large Language Models", "arXiv:2401.02938")
ALPS = Citation(
    "Meng et al.", 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs", "arXiv:2406.07831"
)
GPTAQ = Citation(
    "Li et al.",
    2025,
    "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    "arXiv:2504.02692",
)
MODULE = "pipeline.pruning.updates"

UPDATES = Registry(
    "prune.update",
    f"{MODULE}:WeightUpdate",
    Entry(NONE, NONE, "The kept weights do not change", f"{MODULE}:WeightUpdate"),
    Entry("obs", "OBS", "SparseGPT's update, column by column", f"{MODULE}:ObsUpdate", SPARSEGPT, ("damp",)),
    Entry(
        "admm",
        "ADMM",
        "Alternates between least squares and the mask",
        f"{MODULE}:Admm",
        ADMM,
        ("damp", "update_steps"),
    ),
    Entry(
        "least_squares",
        "least squares",
        "The smallest output error for the mask, by conjugate gradients",
        f"{MODULE}:LeastSquares",
        ALPS,
        ("damp", "update_steps"),
    ),
)

DENSE_TARGET = Entry(  # of the setting prune.target
    "dense",
    "dense target",
    "Matrices reproduce the outputs of the dense model from the pruned model's inputs",
    "pipeline.pruning.dense_target:DenseTarget",
    GPTAQ,
)

"""The Python API, installed as `espalier`: prunes, recovers and measures a Hugging Face causal LM that is in memory.

    masks = espalier.prune(model, tokenizer, method="wanda", sparsity="2:4", calibration=texts)
    espalier.finetune(model, masks, texts, max_steps=200)
    espalier.evaluate(model, tokenizer, perplexity=["wikitext2"])

All functions work in place, in one process, and leave no files (but for `export`); the model keeps its device, dtype, modes and
`requires_grad`, and the random state stays the caller's. What is wrong is one `UserError`, as a rule before anything is
changed; an error in the midst of `prune`, `reconstruct` or a full fine-tuning leaves the weights as far as they came.

A text is a list of strings, a `datasets.Dataset` (a column `text`, `input_ids` or of conversations), the name of a data set
as recipes have it ("c4", "wikitext2", a hub id, a path), or a tensor of token ids.
"""

from importlib.metadata import PackageNotFoundError, version

from pipeline.compact.compact_model import load_compact
from pipeline.recovery.lora import load_adapter
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks

from .evaluation import evaluate
from .exporting import export
from .masking import apply, verify
from .pruning import prune, reconstruct
from .recovery import finetune

__all__ = [
    "Masks",
    "UserError",
    "apply",
    "evaluate",
    "export",
    "finetune",
    "load_adapter",
    "load_compact",
    "prune",
    "reconstruct",
    "verify",
]

try:
    __version__ = version("espalier")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "unknown"

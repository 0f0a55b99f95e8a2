"""The Python API, installed as `espalier`: prunes, recovers and measures a Hugging Face model that is in memory.

    masks = espalier.prune(model, tokenizer, method="wanda", sparsity="2:4", calibration=texts)
    espalier.finetune(model, masks, texts, max_steps=200)
    espalier.evaluate(model, tokenizer, perplexity=["wikitext2"])

All functions work in place, in one process, and write no files (except `export`). The model keeps its device, dtype, modes and
`requires_grad`, and the caller's random state is restored. Errors are `UserError`s, usually before anything is changed; an
error during `permute`, `prune`, `reconstruct` or full fine-tuning leaves the weights partly changed.

A text is a list of strings, a `datasets.Dataset` (with a column `text`, `input_ids`, or of conversations), the name of a data
set as in recipes ("c4", "wikitext2", a hub id, a path), or a tensor of token ids. Image classifiers read images in place of
texts: a `datasets.Dataset` (with columns `image` and `label`), the name of a data set, or a folder of class folders.
"""

from importlib.metadata import PackageNotFoundError, version

from pipeline.compact.compact_model import load_compact
from pipeline.recovery.adapter_files import load_adapter
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks

from .evaluation import evaluate
from .exporting import export
from .masking import apply, verify
from .pruning import permute, prune, reconstruct
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
    "permute",
    "prune",
    "reconstruct",
    "verify",
]

try:
    __version__ = version("espalier")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

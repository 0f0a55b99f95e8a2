"""The pipeline of Espalier.

Silences progress bars, warnings and info messages of the libraries.
"""

import logging
import os
import warnings

for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise a warning at each fork of a data loader
# by name, because lightning sets the level of its root loggers on import
for name in (
    "bitsandbytes",
    "datasets",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
):
    logging.getLogger(name).setLevel(logging.ERROR)
for module in ("lightning", "torchdata", "transformers", "peft", "torch"):
    warnings.filterwarnings("ignore", module=module)

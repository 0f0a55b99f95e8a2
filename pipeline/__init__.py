"""The stages of Espalier and what they are made of.

The terminal is left to what the user asked for: here the libraries are told to speak of errors only.
"""

import logging
import os
import warnings

for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of a data loader
# lightning sets the level of its own root loggers when it is imported, so the ones below are named
for name in (
    "bitsandbytes",
    "datasets",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
):
    logging.getLogger(name).setLevel(logging.ERROR)
for module in ("lightning", "torchdata", "transformers", "peft", "torch"):
    warnings.filterwarnings("ignore", module=module)

"""`python launch.py export MODEL_FOLDER MASKS_FILE TARGET [values=int8]`: writes a pruned model as a compact folder.

With `values=int8` the kept weights are rounded to 8 bits with a scale for each row, which loses a little; else it is exact.
Layer by layer, so that a model larger than the memory can be exported. A quantised model is written in plain weights.
"""

from pipeline.commands.verify import paths
from pipeline.compact.export import export
from pipeline.sparsity.masks import Masks

USAGE = "run `python launch.py export MODEL_FOLDER MASKS_FILE TARGET [values=int8]`"


def main(arguments: list[str]) -> None:
    """Writes TARGET, which must not be there: whole or not at all."""
    words = [word for word in arguments if word.startswith("values=")]
    folder, path, target = paths([word for word in arguments if word not in words], 3, USAGE)
    masks, values = Masks.load(path), words[-1].partition("=")[2] if words else "exact"
    dense, packed = export(folder, masks, target, values=values)
    print(f"{target}: {len(masks)} pruned matrices take {packed / max(1, dense):.3f} of their {dense:,} bytes")

"""`python launch.py export MODEL_FOLDER MASKS_FILE TARGET`: writes a pruned model as a compact folder.

Layer by layer, so that a model larger than the memory can be exported. A quantised model is written in plain weights.
"""

from pipeline.commands.verify import paths
from pipeline.compact.export import export
from pipeline.sparsity.masks import Masks

USAGE = "run `python launch.py export MODEL_FOLDER MASKS_FILE TARGET`"


def main(arguments: list[str]) -> None:
    """Writes TARGET, which must not be there: whole or not at all."""
    folder, path, target = paths(arguments, 3, USAGE)
    masks = Masks.load(path)
    dense, packed = export(folder, masks, target)
    print(f"{target}: {len(masks)} pruned matrices take {packed / max(1, dense):.3f} of their {dense:,} bytes")

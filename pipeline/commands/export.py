"""`python launch.py export MODEL_FOLDER MASKS_FILE TARGET [values=int8]`: writes a pruned model as a compact folder.

With `values=int8` the kept weights are rounded to 8 bits with a scale for each row, which loses some quality; otherwise the
export is lossless. It works layer by layer, so the model may be larger than the memory. A quantised model is dequantised.
"""

from pipeline.commands.verify import paths
from pipeline.compact.export import export
from pipeline.sparsity.masks import Masks

USAGE = "run `python launch.py export MODEL_FOLDER MASKS_FILE TARGET [values=int8]`"


def main(arguments: list[str]) -> None:
    """Writes TARGET, which must not exist and appears only when it is complete."""
    words = [word for word in arguments if word.startswith("values=")]
    (folder, path, target), recipe = paths([word for word in arguments if word not in words], 3, USAGE)
    masks, values = Masks.load(path), words[-1].partition("=")[2] if words else "exact"
    dense, packed = export(folder, masks, target, recipe, values)
    print(f"{target}: {len(masks)} pruned matrices take {packed / max(1, dense):.3f} of their {dense:,} bytes")

"""The export stage: writes the last model of the run as a compact folder."""

import shutil
from pathlib import Path

from pipeline.compact.export import export
from pipeline.models import loading, model_files
from pipeline.models.architecture import classifies_images
from pipeline.reporting import card
from pipeline.runtime import files, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks


def last_model(inputs: dict[str, Path]) -> Path:
    """The model folder of the last stage in `inputs` that writes one. Needs at least the prune stage."""
    return next(inputs[stage] for stage in ("finetune", "reconstruct", "prune") if stage in inputs) / "model"


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `compact/` and `sizes.json`: the bytes of the pruned matrices and of all weight files in both formats."""
    if not processes.is_main():
        return
    model, target = last_model(inputs), folder / "compact"
    shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed in this stage
    masks = Masks.load(inputs["prune"] / "masks.safetensors")
    try:
        dense, packed = export(model, masks, target, recipe, recipe.export.values)
    except UserError as error:
        raise UserError(f"export cannot write {model} as a compact folder: {error}") from error
    sizes = {
        "matrices": len(masks),
        "matrix_bytes": {"ordinary": dense, "compact": packed},
        "file_bytes": {
            "ordinary": sum(path.stat().st_size for path in model_files.weight_files(model)),
            "compact": sum(path.stat().st_size for path in target.glob("*.safetensors")),
        },
    }
    files.write_json(folder / "sizes.json", sizes)
    images = classifies_images(loading.config(model, recipe))
    metrics = inputs["finetune"] / "metrics.csv" if "finetune" in inputs else None
    card.write_model_card(target, recipe, model.parent.name, images, metrics, compact=True)
    processes.say(f"  pruned matrices: {packed / max(1, dense):.3f} of their {dense:,} bytes")

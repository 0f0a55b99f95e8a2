"""`export`: a pruned model as a compact folder, which `load_compact` loads."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.compact import export as writer
from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks

from . import inputs


@inputs.api_function
def export(
    model: PreTrainedModel | str | Path,
    masks: Masks,
    target: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, int | float]:
    """Writes a pruned model as the compact folder `target`, which must not be there: whole or not at all.

    `model` is one in memory, or an ordinary model folder, whose tokenizer comes along; with one in memory, `tokenizer` does,
    if it is given, and the model is for a while saved beside `target`. The model itself does not change.

    Returns "matrices", the number of pruned matrices, their "bytes" and "compact_bytes", and "share", the second of the first
    (50% of bfloat16: 0.5625). Raises `UserError` where a pruned weight is not +0.0, where the masks are another model's, and
    where `target` is there.
    """
    place = Path(target).expanduser()
    if place.exists():  # before the model is saved
        raise UserError(f"{place} is there already: choose another target, or remove it")
    if isinstance(model, str | Path):
        inputs.check_masks(masks)
        if not Path(model).expanduser().is_dir():
            raise UserError(f"model={model}: no such folder")
        dense, packed = writer.export(loading.locate(str(model), None), masks, place)
    else:
        inputs.check_model(model)
        inputs.check_masks(masks, model)
        if tokenizer is not None:
            inputs.check_tokenizer(tokenizer, model)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            dense, packed = writer.export(Path(folder), masks, place)
    return {"matrices": len(masks), "bytes": dense, "compact_bytes": packed, "share": packed / max(1, dense)}

"""`export`: a pruned model as a compact folder, which `load_compact` loads."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.compact import export as writer
from pipeline.models import loading
from pipeline.runtime import files
from pipeline.runtime.errors import UserError, one_line
from pipeline.sparsity.masks import Masks

from . import inputs


@inputs.api_function
def export(
    model: PreTrainedModel | str | Path,
    masks: Masks,
    target: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, int | float]:
    """Writes a pruned model to the compact folder `target`, which must not exist. Writes the complete folder or nothing.

    `model` is a model in memory or an ordinary model folder, and does not change. The tokenizer of a folder is copied; for a
    model in memory, pass `tokenizer` to save it too. A model in memory is saved to a temporary folder next to `target`.

    Returns "matrices" (the number of pruned matrices), their "bytes" and "compact_bytes", and "share", the quotient
    compact_bytes / bytes (0.5625 for bfloat16 at 50%). Raises `UserError` if a pruned weight is not +0.0, if the masks belong
    to another model, or if `target` exists.
    """
    folder = Path(target).expanduser()
    files.refuse_existing(folder)  # before the model is saved
    if isinstance(model, str | Path):
        inputs.check_masks(masks)
        if not Path(model).expanduser().is_dir():
            raise UserError(f"model={model}: no such folder")
        dense, packed = writer.export(loading.locate(str(model), None), masks, folder)
    else:
        inputs.check_model(model)
        inputs.check_masks(masks, model)
        if tokenizer is not None:
            inputs.check_tokenizer(tokenizer, model)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            try:
                model.save_pretrained(temporary)
            except (RuntimeError, ValueError) as error:  # weights shared by hand, an invalid generation_config
                raise UserError(f"transformers cannot save the model: {one_line(error)}") from error
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            dense, packed = writer.export(Path(temporary), masks, folder)
    return {"matrices": len(masks), "bytes": dense, "compact_bytes": packed, "share": packed / max(1, dense)}

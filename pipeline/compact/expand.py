"""Writes the ordinary model folder that a compact one was exported from, file by file."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from pipeline.compact import empty_model, file_format
from pipeline.models import file_names, model_files
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe


def expand(folder: Path, target: Path, recipe: Recipe | None = None) -> bool:
    """Checks the hashes of all files in `folder` and writes the model to `target`, which appears only when it is complete.
    Returns whether the weights are bit-equal to the exported model's (not with int8 values, which are dequantised).

    Raises `UserError` if `target` exists, or if the folder is not a compact model or is damaged.
    """
    if target.exists():
        raise UserError(f"{target} exists already: choose another TARGET, or remove it")
    found = file_format.CompactFolder(folder)
    found.check_contents()
    model = empty_model.skeleton(found, recipe or Recipe())
    file_names.set_file_names(model, found.names)
    tmp = target.with_name(f".{target.name}.part")
    shutil.rmtree(tmp, ignore_errors=True)
    for path in found.shards:
        state = {
            name: value.dense() if isinstance(value, file_format.Compact) else value for name, value in found.read(path)
        }
        state = {name: tensor.contiguous() for name, tensor in file_names.to_files(model, state).items()}
        with files.atomic_write(tmp / path.name.replace("compact-", "model-")) as part:
            save_file(state, part, {"format": "pt"})
    model_files.copy_other_files(folder, tmp)
    (tmp / file_format.MANIFEST).unlink()
    model_files.write_index(tmp)
    tmp.rename(target)
    return all(layout.values == "exact" for layout in found.layouts.values())

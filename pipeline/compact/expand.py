"""Writes the ordinary model folder that a compact one was exported from, file by file."""

from pathlib import Path

from safetensors.torch import save_file

from pipeline.compact import empty_model, file_format
from pipeline.models import file_names, model_files
from pipeline.runtime import files
from pipeline.settings.schema import Recipe


def expand(folder: Path, target: Path, recipe: Recipe | None = None) -> bool:
    """Checks the hashes of all files in `folder` and writes the model to `target`, which appears only when it is complete.
    Returns whether the weights are bit-equal to the exported model's (not with int8 values, which are dequantised).

    Raises `UserError` if `target` exists, or if the folder is not a compact model or is damaged.
    """
    with files.new_folder(target) as work:
        found = file_format.CompactFolder(folder)
        found.check_contents()
        model = empty_model.skeleton(found, recipe or Recipe())
        file_names.set_file_names(model, found.names)
        for path in found.shards:
            read = found.read(path)
            state = {name: value.dense() if isinstance(value, file_format.Compact) else value for name, value in read}
            state = {name: tensor.contiguous() for name, tensor in file_names.to_files(model, state).items()}
            with files.atomic_write(work / path.name.replace("compact-", "model-")) as part:
                save_file(state, part, {"format": "pt"})
        model_files.copy_other_files(folder, work)
        (work / file_format.MANIFEST).unlink()
        model_files.write_index(work)
    return all(layout.values == "exact" for layout in found.layouts.values())

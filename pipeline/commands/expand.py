"""`python launch.py expand COMPACT_FOLDER TARGET`: writes the ordinary model folder that a compact one was exported from.

Tensor by tensor to the bit, under the names of the input's files; they may be cut into other files. Of a folder with int8
values the weights are dequantised: they are not the original's, and a line says so.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from pipeline.compact import empty_model, file_format
from pipeline.models import file_names, model_files
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

USAGE = "run `python launch.py expand COMPACT_FOLDER TARGET`"


def main(arguments: list[str]) -> None:
    """Writes TARGET, which must not be there: whole or not at all."""
    given = [Path(argument).expanduser() for argument in arguments if argument != "debug=true"]
    if len(given) != 2:
        raise UserError(f"2 paths are needed, {len(given)} given: {USAGE}")
    kind = "an ordinary model folder"
    is_exact = expand(*given)
    print(
        f"{given[1]}: {kind}"
        if is_exact
        else f"{given[1]}: {kind} of dequantised int8 weights, not the original's bits"
    )


def expand(folder: Path, target: Path, recipe: Recipe | None = None) -> bool:
    """Checks the hashes of all files in `folder`, and writes the model to `target`, shard by shard. Returns whether it is the
    exported model to the bit (False for int8 values, which are dequantised).

    Raises `UserError` where `target` is there, and where the folder is no compact model, or is damaged.
    """
    if target.exists():
        raise UserError(f"{target} is there already: choose another TARGET, or remove it")
    found = file_format.CompactFolder(folder)
    found.check_contents()
    model = empty_model.skeleton(found, recipe or Recipe())
    file_names.set_file_names(model, found.names)
    tmp = target.with_name(f".{target.name}.part")
    shutil.rmtree(tmp, ignore_errors=True)
    for path in found.shards:
        state = {name: it.dense() if isinstance(it, file_format.Compact) else it for name, it in found.read(path)}
        state = {name: tensor.contiguous() for name, tensor in file_names.to_files(model, state).items()}
        with files.atomic_write(tmp / path.name.replace("compact-", "model-")) as part:
            save_file(state, part, {"format": "pt"})
    model_files.copy_other_files(folder, tmp)
    (tmp / file_format.MANIFEST).unlink()
    model_files.write_index(tmp)
    tmp.rename(target)
    return all(layout.values == "exact" for layout in found.layouts.values())

"""Writes a pruned model as a compact folder, layer by layer, so that it need not fit into memory."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.compact import file_format
from pipeline.models import model_files
from pipeline.models.rewrite import Layer, layers, shards
from pipeline.runtime import files, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks


def export(
    folder: Path, masks: Masks, target: Path, recipe: Recipe | None = None, values: str = "exact"
) -> tuple[int, int]:
    """Writes the model in `folder` with its masks to `target`; returns the bytes of the pruned matrices before and after.

    `values` is `exact`, or `int8` to round the kept weights to 8 bits with a scale for each row of a matrix. Raises
    `UserError` if `target` exists, if the masks are another model's, or if a pruned weight is not +0.0.
    """
    if values not in file_format.KINDS:
        raise UserError(f"values={values} is unknown: set values=exact or values=int8")
    recipe = recipe or Recipe()
    with files.new_folder(target) as work:
        model, found = layers(folder, recipe)
        masks.refuse_other_model(model)
        matrices, dense, packed = _write_shards(work, model, found, masks, values)
        written = {matrix for name in matrices for matrix in _matrices(name, model.get_parameter(name))}
        if left := set(masks) - written:
            raise UserError(
                f"{min(left)} is another name of a tied weight ({len(left)} in all): tied weights stay dense"
            )
        model_files.copy_other_files(folder, work)
        _write_manifest(work, folder, model, matrices, values)
    return dense, packed


def _write_shards(
    folder: Path, model: nn.Module, found: dict[str, Layer], masks: Masks, values: str
) -> tuple[dict[str, file_format.Layout], int, int]:
    """The compact matrices by name, and their bytes before and after."""
    parts = list(shards(model, list(found)))
    matrices: dict[str, file_format.Layout] = {}
    dense = packed = 0
    report = processes.progress("  export: ")
    for number, members in enumerate(parts, 1):
        report(f"file {number} of {len(parts)}")
        state: dict[str, Tensor] = {}
        for layer in members:
            for name, weight in found[layer]():
                compact = _compressed(name, weight, masks, values)
                if compact is None:
                    state[name] = weight.contiguous()
                    continue
                matrices[name] = compact.layout
                state |= compact.tensors()
                dense, packed = dense + weight.nbytes, packed + compact.nbytes
        with files.atomic_write(folder / f"compact-{number:05d}-of-{len(parts):05d}.safetensors") as path:
            save_file(state, path, {"format": "pt"})
    return matrices, dense, packed


def _matrices(name: str, parameter: Tensor) -> list[str]:
    """The names that the masks of a parameter have."""
    return [f"{name}[{expert}]" for expert in range(len(parameter))] if parameter.dim() == 3 else [name]


def _compressed(name: str, weight: Tensor, masks: Masks, values: str) -> file_format.Compact | None:
    masked = [masks.packed[matrix] for matrix in _matrices(name, weight) if matrix in masks.packed]
    if not masked:
        return None
    if len(kinds := {entry.transposed for entry in masked}) > 1:
        raise UserError(f"the masks of {name} disagree on whether it is transposed")
    patterns = tuple(sorted({entry.pattern for entry in masked}))
    return file_format.compress(name, weight, masks.for_parameter(name, weight), kinds.pop(), patterns, values)


def _write_manifest(
    target: Path, origin: Path, model: nn.Module, matrices: dict[str, file_format.Layout], values: str
) -> None:
    tensors = model_files.open_weights(origin)
    about = {
        "format": file_format.FORMAT,
        "version": file_format.VERSION,
        "pattern": ", ".join(sorted({pattern for layout in matrices.values() for pattern in layout.patterns})),
        "dtype": str(_dtype(model, tensors)).removeprefix("torch."),
        "values": values,
        "matrices": {name: layout.to_json() for name, layout in sorted(matrices.items())},
        "names": sorted(tensors),
        "files": {
            str(path.relative_to(target)): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(target.rglob("*"))
            if path.is_file()
        },
    }
    files.write_json(target / file_format.MANIFEST, about | {"digest": files.digest(about)})


def _dtype(model: nn.Module, tensors: model_files.Tensors) -> torch.dtype:
    """In which transformers loads the model: of its config.json, else of the first weight in its files."""
    return model.config.dtype or next(
        (t.dtype for t in map(tensors.read, tensors) if t.is_floating_point()), torch.float32
    )

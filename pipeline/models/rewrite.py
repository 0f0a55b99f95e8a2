"""Rewrites a model folder layer by layer, under the same names, with some parameters changed."""

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import dequantize, file_names, loading, model_files
from pipeline.runtime import files, processes
from pipeline.settings.schema import Recipe

SHARD = 1 << 30  # bytes per file, and so of memory

Layer = Callable[[], Iterator[tuple[str, Tensor]]]


def layers(folder: Path, recipe: Recipe) -> tuple[nn.Module, dict[str, Layer]]:
    """The model in a folder without weights, and per layer a function that yields name in memory and tensor of each parameter
    and persistent buffer, in the files' dtype. Layer "" is all outside the layers. Reads one layer at a time (a quantised
    model whole). Raises `UserError` as `loading.load` does."""
    dequantize.refuse_unknown(folder)
    model = loading.skeleton(folder, recipe)
    if dequantize.method(folder):
        whole = loading.load(folder, recipe)
        file_names.set_file_names(model, model_files.open_weights(folder))
        found: dict[str, Layer] = {}
        state = file_names.saved_state(whole)
        for layer in dict.fromkeys(map(file_names.layer_of, state)):
            items = [item for item in state.items() if file_names.layer_of(item[0]) == layer]
            found[layer] = lambda items=items: iter(items)
        return model, found
    tensors = model_files.open_weights(folder)
    names = file_names.FileNames(model, {name: tensors.shape(name) for name in tensors})
    loading.refuse_differences(folder, tensors, names.missing, names.unexpected, names.mismatched)
    file_names.set_file_names(model, tensors)
    return model, {layer: lambda layer=layer: names.read(layer, tensors.read) for layer in names.layers}


def parameters(folder: Path, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Name in memory and tensor of each parameter and persistent buffer, one at a time."""
    for layer in layers(folder, recipe)[1].values():
        yield from layer()


def rewrite(origin: Path, target: Path, recipe: Recipe, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Copies the model folder `origin` to `target`, with the weights that `change(name in memory, weight)` returns; None
    keeps a weight.

    All ranks must call it, since `change` may gather a weight from all of them; rank 0 writes.
    """
    model, found = layers(origin, recipe)
    changeable = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parts = list(shards(model, list(found)))
    for number, members in enumerate(parts, 1):
        state = {}
        for layer in members:
            for name, weight in found[layer]():
                new = change(name, weight) if name in changeable else None
                if processes.is_main():
                    state[name] = weight if new is None else new.detach().to(weight.dtype).cpu()
        if processes.is_main():
            state = {name: tensor.contiguous() for name, tensor in file_names.to_files(model, state).items()}
            with files.atomic_write(target / f"model-{number:05d}-of-{len(parts):05d}.safetensors") as tmp:
                save_file(state, tmp, {"format": "pt"})
    if processes.is_main():
        model_files.copy_other_files(origin, target)
        model_files.write_index(target)


def shards(model: nn.Module, names: list[str]) -> Iterator[list[str]]:
    """Groups the layers into files of about `SHARD` bytes."""
    sizes = dict.fromkeys(names, 0)
    for name, tensor in model.state_dict().items():
        if (layer := file_names.layer_of(name)) in sizes:
            sizes[layer] += tensor.numel() * tensor.element_size()
    shard: list[str] = []
    for layer in names:
        if shard and sum(sizes[name] for name in [*shard, layer]) > SHARD:
            yield shard
            shard = []
        shard.append(layer)
    yield shard

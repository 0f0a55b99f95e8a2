"""Owns the way from one model folder to another: layer by layer, under the same names, with some parameters changed."""

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import dequantize, file_names, loading, model_files
from pipeline.runtime import files, processes
from pipeline.settings.schema import Recipe

SHARD = 1 << 30  # bytes, and so of memory

Layer = Callable[[], Iterator[tuple[str, Tensor]]]


def layers(folder: Path, recipe: Recipe) -> tuple[nn.Module, dict[str, Layer]]:
    """The model in a folder without its weights, and by layer what gives the name in memory and the tensor of each of its
    parameters and persistent buffers, in the files' dtype; "" is what lies outside the layers. Only what is asked for is
    read, but of a quantised model all. Raises `UserError` as `models.load` does."""
    dequantize.refuse_unknown(folder)
    model = loading.skeleton(folder, recipe)
    if dequantize.method(folder):
        whole = loading.load(folder, recipe)
        file_names.remember(model, model_files.opened(folder))
        found: dict[str, Layer] = {}
        state = file_names.saved(whole)
        for layer in dict.fromkeys(map(file_names.layer_of, state)):
            items = [item for item in state.items() if file_names.layer_of(item[0]) == layer]
            found[layer] = lambda items=items: iter(items)
        return model, found
    tensors = model_files.opened(folder)
    names = file_names.FileNames(model, {name: tensors.shape(name) for name in tensors})
    loading.refuse_differences(folder, tensors, names.missing, names.unexpected, names.mismatched)
    file_names.remember(model, tensors)
    return model, {layer: lambda layer=layer: names.read(layer, tensors.read) for layer in names.layers}


def parameters(folder: Path, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Name in memory and tensor of all of them, one at a time."""
    for layer in layers(folder, recipe)[1].values():
        yield from layer()


def rewrite(origin: Path, target: Path, recipe: Recipe, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Writes `origin` to `target` with the weights that `change(name in memory, weight)` gives; None leaves one as it is.

    All ranks must call, since `change` may put a weight together from the parts that they hold; rank 0 writes.
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
        model_files.copy_beside(origin, target)
        model_files.write_index(target)


def shards(model: nn.Module, names: list[str]) -> Iterator[list[str]]:
    """The layers in files of about `SHARD` bytes."""
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

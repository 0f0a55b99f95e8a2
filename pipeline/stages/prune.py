"""The prune stage: from a dense model and calibration text to a pruned model and masks."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from callbacks.layer_writer import LayerWriter
from callbacks.stop_at_signal import StopAtSignal
from pipeline.engine import walk_memory
from pipeline.engine.blocks import Block, find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.matrices import coverage_entries
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.models import loading
from pipeline.models.architecture import classifies_images
from pipeline.models.copying import copy_of
from pipeline.models.pointwise import mark_pointwise
from pipeline.pruning import calibration
from pipeline.pruning.allocation import allocate, patterns_by_layer
from pipeline.pruning.block_measure import BlockMeasure
from pipeline.pruning.block_pruner import BlockPruner
from pipeline.pruning.combination import prune_method
from pipeline.pruning.dense_target import DenseTarget, packed_with_difference
from pipeline.pruning.method import PruneMethod
from pipeline.registry import ALLOCATIONS
from pipeline.reporting import card
from pipeline.runtime import files, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune, Recipe
from pipeline.sparsity.masks import Masks
from pipeline.sparsity.patterns import Pattern, parse

NOTHING = "nothing was pruned: the calibration text reaches no matrix of the layers"


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/`, `masks.safetensors`, `layers.csv`, `matrices.csv` and `coverage.csv`; `allocation.json` if an allocation
    measures the dense model."""
    origin = loading.dense_folder(recipe, inputs)
    model = loading.load(origin, recipe)
    settings, blocks = recipe.prune, find_blocks(model)
    method = method_of(blocks, settings)  # raises before any text is read
    coverage = tell_coverage(model, blocks, method.patterns)
    batches = calibration.batches(recipe, recipe.calibration, "calibration", origin, model)
    dense = loading.load(origin, recipe) if settings.target == "dense" else None
    hidden_device = plan_memory(model, batches, method)
    pruner = block_pruner(blocks, lambda: loading.load(origin, recipe), batches, hidden_device, settings, folder)
    walk = LayerWalk(model, batches, hidden_device, folder, dense_outputs=recipe.calibration.activations == "dense")
    if done := walk.results.finished_before:
        processes.say(f"  {len(done)} of {len(blocks)} layers are already pruned")
    prune_layers(walk, pruner, dense, [LayerWriter(), StopAtSignal()])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        finish(walk, origin, recipe, coverage)


def in_memory(model: nn.Module, batches: list[Tensor], recipe: Recipe) -> Masks:
    """Prunes the model in place, on its device; returns its masks. `batches`: tokens, each (batch_size, seq_len)."""
    if recipe.prune.pointwise:
        mark_pointwise(model)
    settings, blocks = recipe.prune, find_blocks(model)
    method = method_of(blocks, settings)
    tell_coverage(model, blocks, method.patterns)
    dense = copy_of(model) if settings.target == "dense" else None
    hidden_device = plan_memory(model, batches, method)
    pruner = block_pruner(blocks, lambda: model, batches, hidden_device, settings)
    dense_outputs = recipe.calibration.activations == "dense"
    walk = LayerWalk(model, batches, hidden_device, in_memory=True, dense_outputs=dense_outputs)
    prune_layers(walk, pruner, dense, [LayerWriter()])
    if not walk.results.masks:
        raise UserError(NOTHING)
    walk.results.masks.channel_order = getattr(model.config, "channel_order", None)
    return walk.results.masks


def method_of(blocks: list[Block], settings: Prune) -> PruneMethod:
    """The method that the settings choose, with the patterns before an allocation. Raises `UserError` as `allocate` and
    `prune_method` do."""
    return prune_method(settings, allocate(blocks, settings))


def tell_coverage(model: nn.Module, blocks: list[Block], patterns: dict[str, Pattern]) -> Coverage:
    """Prints what will be pruned, and what stays dense and why."""
    coverage = Coverage(coverage_entries(model, blocks), patterns.keys())
    for name, text in coverage.describe(patterns):
        processes.say(f"  {name}: {text}")
    return coverage


def plan_memory(model: nn.Module, batches: list[Tensor], method: PruneMethod) -> torch.device:
    """See `walk_memory.plan_memory`."""
    where, copies = method.settings.hidden_states, method.copies
    if method.settings.target == "pruned":
        return walk_memory.plan_memory(model, batches, where, observe=method.observe, copies=copies)

    def pair(input_NI: Tensor) -> Tensor:
        return packed_with_difference(method.observe(input_NI), input_NI, input_NI)

    return walk_memory.plan_memory(model, batches, where, 2, observe=pair, copies=copies)


def prune_layers(walk: LayerWalk, pruner: BlockPruner, dense: nn.Module | None, callbacks: list[Callback]) -> None:
    """Runs the walk, and the forwards of the `dense` model along with it if there is one."""
    with ExitStack() as stack:
        if dense is not None:
            pruner.target = DenseTarget(stack.enter_context(walk.paused_forwards(dense)))
        run_layerwise(walk, pruner, callbacks)


def block_pruner(
    blocks: list[Block],
    load_dense: Callable[[], nn.Module],
    batches: list[Tensor],
    hidden_device: torch.device,
    settings: Prune,
    folder: Path | None = None,
) -> BlockPruner:
    """The pruner that the settings choose. With a `folder`, an allocation's measurements of the dense model are stored in its
    `allocation.json` for a resumed run."""
    by_layer = None
    if ALLOCATIONS.entry(settings.allocation).shares_ratio:
        by_layer = layer_patterns(blocks, load_dense, batches, hidden_device, settings, folder)
    patterns = allocate(blocks, settings, by_layer)
    return BlockPruner(prune_method(settings, patterns))


def layer_patterns(
    blocks: list[Block],
    load_dense: Callable[[], nn.Module],
    batches: list[Tensor],
    hidden_device: torch.device,
    settings: Prune,
    folder: Path | None,
) -> dict[int, Pattern]:
    """The pattern of each layer; walks through the dense model first if the allocation measures it."""
    path = folder and folder / "allocation.json"
    allocation = ALLOCATIONS.entry(settings.allocation).load()(settings)
    before = (processes.from_main(files.read_json(path)) if path else None) or {"measured": {}}
    measured = {int(index): value for index, value in before["measured"].items()}
    if allocation.measure and not measured:
        measure = BlockMeasure(allocation)
        run_layerwise(LayerWalk(load_dense(), batches, hidden_device), measure, [StopAtSignal()] if folder else [])
        measured = measure.measured
        if path and processes.is_main():
            files.write_json(path, {"measured": measured})
    return patterns_by_layer(allocation, blocks, measured, parse(settings.sparsity).ratio)


def finish(walk: LayerWalk, origin: Path, recipe: Recipe, coverage: Coverage) -> None:
    """Writes the rest of the model folder, all masks in one file, and the tables."""
    folder = walk.results.folder
    order = getattr(walk.model.config, "channel_order", None)
    rows = Masks.merge(walk.results.masks_files(), folder / "masks.safetensors", order)
    matrices = [matrix for row in rows for matrix in row.pop("matrices")]
    if not matrices:
        raise UserError(NOTHING)
    walk.results.write_remaining(origin, recipe.dtype)
    files.write_csv(folder / "coverage.csv", coverage.rows({row["matrix"] for row in matrices}))
    files.write_csv(folder / "layers.csv", rows)
    files.write_csv(folder / "matrices.csv", matrices)
    card.write_model_card(folder / "model", recipe, "prune", classifies_images(walk.model.config))

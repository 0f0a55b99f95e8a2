"""The permute stage: reorders channels of the dense model so that N of M keeps more importance. The result computes the same
and serves as the dense model of the later stages.

After Zhang et al. 2024 ("Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models").
"""

import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from callbacks.layer_writer import LayerWriter
from callbacks.stop_at_signal import StopAtSignal
from pipeline.engine import walk_memory
from pipeline.engine.blocks import find_blocks
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.models import loading
from pipeline.pruning import calibration
from pipeline.pruning.allocation import allocate
from pipeline.pruning.block_permuter import BlockPermuter
from pipeline.pruning.scores import square_sum
from pipeline.runtime import files, memory, processes
from pipeline.settings.schema import Recipe
from pipeline.sparsity.patterns import parse

BYTES_PER_WEIGHT = 8  # of the float64 copy of a layer that is tested


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/` and `channels.csv`."""
    origin = loading.dense_folder(recipe, inputs)
    model = loading.load(origin, recipe)
    allocate(find_blocks(model), recipe.prune)  # raises before any text is read
    batches = calibration.batches(recipe, recipe.calibration, "calibration", origin, model)
    walk = LayerWalk(model, batches, plan_memory(model, batches, recipe), folder)
    if done := walk.results.finished_before:
        processes.say(f"  {len(done)} of {len(walk.blocks)} layers are already permuted")
    permute_layers(walk, recipe, [LayerWriter(), StopAtSignal()])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        finish(walk, origin, recipe)


def in_memory(model: nn.Module, batches: list[Tensor], recipe: Recipe) -> list[dict[str, Any]]:
    """Permutes the model in place, on its device; returns the rows of `channels.csv`. `batches`: (batch_size, seq_len)."""
    walk = LayerWalk(model, batches, plan_memory(model, batches, recipe), in_memory=True)
    before = getattr(model.config, "channel_order", None)
    model.config.channel_order = f"unfinished {uuid.uuid4().hex}"  # what an interrupted call leaves is another model
    permute_layers(walk, recipe, [LayerWriter()])
    rows = _rows(walk.results.rows)
    del model.config.channel_order
    if order := _fingerprint(before, rows):
        model.config.channel_order = order
    return rows


def plan_memory(model: nn.Module, batches: list[Tensor], recipe: Recipe) -> torch.device:
    """See `walk_memory.plan_memory`."""
    where = recipe.prune.hidden_states
    return walk_memory.plan_memory(model, batches, where, per_weight=BYTES_PER_WEIGHT, observe=square_sum, work="test")


def permute_layers(walk: LayerWalk, recipe: Recipe, callbacks: list[Callback]) -> None:
    permuter = BlockPermuter(walk.model, walk.blocks, parse(recipe.prune.sparsity), recipe.permute.rounds)
    run_layerwise(walk, permuter, callbacks)


def finish(walk: LayerWalk, origin: Path, recipe: Recipe) -> None:
    """Writes the rest of the model folder, and the table."""
    rows = _rows(walk.results.logs())
    walk.results.write_remaining(origin, recipe.dtype)
    files.write_csv(walk.results.folder / "channels.csv", rows)
    path = walk.results.folder / "model" / "config.json"
    config = files.read_json(path)
    if order := _fingerprint(config.get("channel_order"), rows):
        files.write_json(path, config | {"channel_order": order})
    if not rows:
        processes.say("  no channels can be reordered: the permuted model is the dense one")
        return
    before, after = (sum(row[key] for row in rows) / len(rows) for key in ("kept_before", "kept_after"))
    processes.say(
        f"  of the importance of {len(rows)} matrices, {recipe.prune.sparsity} keeps {after:.4f}, with the original order of "
        f"channels {before:.4f}"
    )


def _rows(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for log in logs for row in log["matrices"]]


def _fingerprint(before: str | None, rows: list[dict[str, Any]]) -> str | None:
    """The new `channel_order` of the config, which tells masks of one order from models in another: a digest of the previous
    one and all orders; the previous one if no channel moved."""
    orders = [row["order"] for row in rows]
    return files.digest([before, *orders]) if any(orders) else before

"""The permute stage: reorders channels of the dense model such that N of M keeps more importance. The result computes the same,
and the stages after it take it for the dense model.

After Zhang et al. 2024 ("Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models").
"""

from pathlib import Path

from callbacks.layer_writer import LayerWriter
from callbacks.stop_at_signal import StopAtSignal
from pipeline.engine.block_files import write_rows
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
    blocks = find_blocks(model)
    allocate(blocks, recipe.prune)  # raises before any text is read
    batches = calibration.batches(recipe, recipe.calibration, "calibration", origin, model)
    where = recipe.prune.hidden_states
    store = calibration.plan_memory(model, batches, where, per_weight=BYTES_PER_WEIGHT, observe=square_sum, work="test")
    permuter = BlockPermuter(model, blocks, parse(recipe.prune.sparsity), recipe.permute.rounds)
    walk = LayerWalk(model, batches, store, folder)
    if done := walk.files.finished_before:
        processes.say(f"  {len(done)} of {len(blocks)} layers are already permuted")
    run_layerwise(walk, permuter, [LayerWriter(), StopAtSignal()])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        finish(walk, origin, recipe)


def finish(walk: LayerWalk, origin: Path, recipe: Recipe) -> None:
    """Writes the rest of the model folder, and the table. The config gets a fingerprint of the orders, `channel_order`, so that
    masks of one order are not applied to a model in another."""
    rows = [row for log in walk.files.logs() for row in log["matrices"]]
    walk.files.write_remaining(origin, recipe.dtype)
    write_rows(walk.files.folder / "channels.csv", rows)
    if any(row["order"] for row in rows):
        path = walk.files.folder / "model" / "config.json"
        order = files.digest([files.read_json(path).get("channel_order"), *(row["order"] for row in rows)])
        files.write_json(path, files.read_json(path) | {"channel_order": order})
    if not rows:
        processes.say("  no channels can be reordered: the permuted model is the dense one")
        return
    before, after = (sum(row[key] for row in rows) / len(rows) for key in ("kept_before", "kept_after"))
    processes.say(
        f"  of the importance of {len(rows)} matrices, {recipe.prune.sparsity} keeps {after:.4f}, with the original order of "
        f"channels {before:.4f}"
    )

"""The reconstruct stage: trains each pruned layer to give the hidden states of the dense model; the masks do not change.

Layer by layer, before any end-to-end training, as in EBFT (Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for
Sparse LLMs").
"""

from pathlib import Path

from torch import Tensor, nn

from callbacks.layer_writer import LayerWriter
from callbacks.stop_at_signal import StopAtSignal
from pipeline.engine import walk_memory
from pipeline.engine.walk import LayerWalk, run_layerwise
from pipeline.models import loading
from pipeline.models.architecture import classifies_images
from pipeline.pruning import calibration
from pipeline.recovery.layer_reconstructor import LayerReconstructor
from pipeline.reporting import card
from pipeline.runtime import deterministic, files, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Calibration, Recipe, reconstruction_text
from pipeline.sparsity.masks import Masks

HELD_OUT = 8  # the samples of one in 8 steps are held out
BYTES_PER_WEIGHT = 4 + 8 + 8 + 4 + 4  # fp32 weight, Adam's moments, gradients in float64 and fp32, best weight


def check(recipe: Recipe) -> None:
    """Raises `UserError` if the samples cannot be divided into steps."""
    if "reconstruct" in recipe.stages:
        plan_steps(reconstruction_text(recipe), recipe.reconstruct.accumulate, processes.world_size())


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/` and `layers.csv`."""
    settings, text, origin = recipe.reconstruct, reconstruction_text(recipe), inputs["prune"] / "model"
    steps = plan_steps(text, settings.accumulate, processes.world_size())
    masks = Masks.load(inputs["prune"] / "masks.safetensors")
    model = loading.load(origin, recipe)
    dense = loading.load(loading.dense_folder(recipe, inputs), recipe)
    batches = calibration.batches(recipe, text, "reconstruct", origin, model)
    hidden_device = walk_memory.plan_memory(model, batches, recipe.prune.hidden_states, 2, BYTES_PER_WEIGHT)
    walk = LayerWalk(model, batches, hidden_device, folder)
    if done := walk.results.finished_before:
        processes.say(f"  {len(done)} of {len(walk.blocks)} layers are already reconstructed")
    with walk.paused_forwards(dense) as forwards, deterministic.training(recipe.deterministic):
        reconstructor = LayerReconstructor(forwards, masks, settings, recipe.seed, steps)
        run_layerwise(walk, reconstructor, [LayerWriter(), StopAtSignal()])
    processes.say(f"  memory: at most {memory.text(memory.peak_gib(processes.device()))}")
    if processes.is_main():
        walk.results.write_remaining(origin, recipe.dtype)
        files.write_csv(folder / "layers.csv", walk.results.logs())
        card.write_model_card(folder / "model", recipe, "reconstruct", classifies_images(model.config))


def in_memory(
    model: nn.Module, dense: nn.Module, masks: Masks, batches: list[Tensor], recipe: Recipe, steps: list[range]
) -> list[dict]:
    """Reconstructs the model's layers in place; returns the rows of `layers.csv`. `batches`: tokens, (batch_size, seq_len)."""
    hidden_device = walk_memory.plan_memory(model, batches, recipe.prune.hidden_states, 2, BYTES_PER_WEIGHT)
    walk = LayerWalk(model, batches, hidden_device, in_memory=True)
    with walk.paused_forwards(dense) as forwards:
        reconstructor = LayerReconstructor(forwards, masks, recipe.reconstruct, recipe.seed, steps)
        run_layerwise(walk, reconstructor, [LayerWriter()])
    return walk.results.rows


def plan_steps(text: Calibration, accumulate: int, world_size: int) -> list[range]:
    """The batches of each process by step of an epoch; the batches after the last step are held out."""
    samples = accumulate * text.batch_size  # per step
    if accumulate % world_size:
        raise UserError(
            f"reconstruct.accumulate={accumulate} batches per step cannot be shared by {world_size} processes: set "
            f"reconstruct.accumulate={world_size} reconstruct.batch_size={max(1, samples // world_size)}"
        )
    count = text.samples // samples
    if count < 2:
        raise UserError(
            f"{text.samples} samples are too few for a step of {samples} to train on and one to hold out: "
            f"set reconstruct.samples={HELD_OUT * samples}"
        )
    batches = accumulate // world_size  # per step and process
    return [range(step * batches, (step + 1) * batches) for step in range(count - max(1, count // HELD_OUT))]

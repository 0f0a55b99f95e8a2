"""`permute`, `prune` and `reconstruct`: the walks over the layers of a model in memory."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import images, token_windows
from pipeline.engine.blocks import find_blocks
from pipeline.models import loading
from pipeline.pruning.allocation import allocate
from pipeline.pruning.calibration import split
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Calibration, reconstruction_text
from pipeline.sparsity.masks import Masks
from pipeline.stages import permute as permute_stage
from pipeline.stages import prune as prune_stage
from pipeline.stages import reconstruct as reconstruct_stage
from pipeline.tasks.task import Samples

from . import image_inputs, inputs, model_state
from .inputs import Texts


@inputs.api_function
def permute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sparsity: str = "2of4",
    calibration: Texts = "c4",
    *,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    column: str | None = None,
    seed: int = 0,
    mirror: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Reorders channels of the dense `model`, in place, so that `prune` with the same `sparsity` (N:M) keeps more of the
    importance of the weights. The model computes the same up to rounding.

    The text is as in `prune`. `settings`: any other key of the recipe's section `permute`. Returns a row per matrix whose
    inputs can be reordered: "layer", "matrix", "kept_before" and "kept_after", the shares of the importance that `sparsity`
    keeps, and "order", a digest of the new order, None if the old one is best. `model.config.channel_order` and the masks
    record the order, and masks are refused for another.

    After Zhang et al. 2024, "Plug-and-Play" (section 3.2). Raises `UserError`.
    """
    inputs.check_model(model)
    text = {"samples": samples, "seq_len": seq_len, "batch_size": batch_size, "column": column}
    chosen = {"prune": {"sparsity": sparsity}, "permute": settings, "calibration": text}
    recipe = inputs.recipe(["permute", "prune"], seed, mirror, **chosen)
    allocate(find_blocks(model), recipe.prune)  # raises before any text is read
    found = _samples(calibration, "calibration", recipe.calibration, "calibration", tokenizer, model, seed, mirror)
    with model_state.preserved(model):
        return permute_stage.in_memory(model, split(found, batch_size), recipe)


@inputs.api_function
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: str | Path = "wanda",
    sparsity: str | float | Path = "2of4",
    calibration: Texts = "c4",
    *,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    activations: str = "pruned",
    column: str | None = None,
    seed: int = 0,
    mirror: str | None = None,
    **settings: Any,
) -> Masks:
    """Prunes the matrices in the decoder layers of `model`, in place; returns their masks (True = kept).

    `method`: a name as in recipes ("wanda", "sparsegpt", "magnitude", ...) or a .py file. `sparsity`: a share of the weights
    (0.5), N kept of each M ("2:4", "2of4"), "as_is" (the zeros of a pruned model; needs `method="magnitude"`), or a .py file.
    `samples` windows of `seq_len` tokens are drawn from `calibration` with `seed`, as the command does; a tensor (N, T) of
    token ids is used unchanged, and needs no tokenizer. `batch_size`: windows per forward. `column`: the column with the
    text. `mirror`: a folder laid out as the hub. `settings`: any other key of the recipe's section `prune` (`espalier keys
    prune`), such as `overrides` or `damp`.

    An image classifier is pruned with `samples` images, or with a tensor of pixel values (N, C, H, W), which needs no
    processor; `tokenizer` is its image processor.

    If there is a GPU, it is used, one layer at a time, wherever the model is. `target="dense"` copies the model first. Raises
    `UserError`.
    """
    inputs.check_model(model)
    chosen = {"method": method, "sparsity": sparsity, **settings}
    text = {"samples": samples, "seq_len": seq_len, "batch_size": batch_size, "column": column}
    text["activations"] = activations
    recipe = inputs.recipe(["prune"], seed, mirror, prune=chosen, calibration=text)
    with model_state.pointwise(recipe.prune.pointwise, model):
        prune_stage.method_of(find_blocks(model), recipe.prune)  # raises before any text is read
        found = _samples(calibration, "calibration", recipe.calibration, "calibration", tokenizer, model, seed, mirror)
        with model_state.preserved(model):
            return prune_stage.in_memory(model, split(found, batch_size), recipe)


@inputs.api_function
def reconstruct(
    model: PreTrainedModel,
    masks: Masks,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Texts = "c4",
    *,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    column: str | None = None,
    seed: int = 0,
    mirror: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Trains the kept weights of each layer of a pruned `model`, in place, towards the hidden states of the `dense` model.

    The text is as in `prune`. `settings`: any other key of the recipe's section `reconstruct` (`espalier keys reconstruct`),
    such as `epochs`, `lr` or `accumulate`. Returns a row per layer, with "error_before" and "error_after": the held-out error
    of its hidden states relative to the dense ones. A layer that does not improve is left unchanged.

    Raises `UserError`, also if a pruned weight of `model` is not zero.
    """
    inputs.check_model(model)
    inputs.check_model(dense, "dense")
    if dense is model or any(p is q for p, q in zip(model.parameters(), dense.parameters())):
        raise UserError("dense is the pruned model itself, or shares its weights: load the dense model again")
    if "dataset" in settings:
        raise UserError("dataset is not an argument of reconstruct: set calibration=...")
    inputs.check_masks(masks, model)
    refuse_violations(model, masks)
    _check_dense(model, dense)
    text = {"samples": samples, "seq_len": seq_len, "batch_size": batch_size, "column": column}
    if isinstance(calibration, Tensor):
        shape = _checked(calibration, "calibration", model).shape
        text |= dict(zip(("samples", "seq_len"), shape[:1] if image_inputs.are_read_by(model) else shape))
    chosen = {"batch_size": batch_size, **settings}
    recipe = inputs.recipe(["prune", "reconstruct"], seed, mirror, calibration=text, reconstruct=chosen)
    steps = reconstruct_stage.plan_steps(reconstruction_text(recipe), recipe.reconstruct.accumulate, 1)
    found = _samples(calibration, "reconstruct", recipe.calibration, "calibration", tokenizer, model, seed, mirror)
    with model_state.preserved(model, dense), model_state.pointwise(inputs.has_convolutions(masks), model, dense):
        return reconstruct_stage.in_memory(model, dense, masks, split(found, batch_size), recipe, steps)


def refuse_violations(model: PreTrainedModel, masks: Masks) -> None:
    if violations := masks.violations(model.named_parameters(remove_duplicate=False)):
        raise UserError(f"the model does not match its masks: {violations[0]}: call espalier.apply(model, masks) first")


def _check_dense(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raises `UserError` if the models have different parameters."""
    shapes = [{(name, tuple(p.shape)) for name, p in module.named_parameters()} for module in (model, dense)]
    if different := shapes[0] ^ shapes[1]:
        raise UserError(f"dense is another model than model: they differ in {min(different)[0]}")


def _checked(data: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """Token windows (N, T), or pixel values (N, C, H, W)."""
    check = image_inputs.pixels if image_inputs.are_read_by(model) else inputs.token_windows
    return check(data, name, model)


def _samples(
    data: Texts,
    section: str,
    text: Calibration,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seed: int,
    mirror: str | None,
) -> Samples:
    """The calibration windows, (N, T), or images, drawn as the command does."""
    if isinstance(data, Tensor):
        return _checked(data, name, model)
    if image_inputs.are_read_by(model):
        source = image_inputs.source(data, section, name, text.column, mirror, text.split)
        processor = image_inputs.processor_of(model, tokenizer)
        return images.drawn(source, processor, model.config, text.samples, seed, section)
    loading.check_length(model.config, "seq_len", text.seq_len)
    tokenizer = inputs.tokenizer_of(model) if tokenizer is None else tokenizer
    inputs.check_tokenizer(tokenizer, model)
    source = inputs.source(data, section, name, text.column, mirror, text.split)
    windows_NT = token_windows.calibration(source, tokenizer, text.samples, text.seq_len, seed, section)
    inputs.check_ids(windows_NT, source, model)
    return windows_NT

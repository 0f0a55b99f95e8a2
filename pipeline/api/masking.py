"""`apply` and `verify`: the masks of a model in memory."""

import torch
from transformers import PreTrainedModel

from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks, apply_, violation_of

from . import inputs


@inputs.api_function
def apply(model: PreTrainedModel, masks: Masks) -> None:
    """Sets the pruned weights of `model` to zero, in place.

    Raises `UserError`, before anything is changed, if a masked matrix is missing or has another shape.
    """
    inputs.check_model(model)
    inputs.check_masks(masks, model)
    with torch.no_grad():
        for name, weight in masks.matched(model.named_parameters(remove_duplicate=False)):
            apply_(weight, masks[name].to(weight.device))


@inputs.api_function
def verify(model: PreTrainedModel, masks: Masks) -> dict[str, int | float]:
    """Counts over the masked matrices of `model`: "matrices", "weights", "zeros", and "sparsity", the share of zeros.

    Raises `UserError` if a pruned weight is not zero, if a mask breaks its recorded pattern, or if a masked matrix is missing
    or has another shape.
    """
    inputs.check_model(model)
    inputs.check_masks(masks, model)
    masks.check_patterns()
    weights = zeros = 0
    problems = []
    with torch.no_grad():
        for name, weight in masks.matched(model.named_parameters(remove_duplicate=False)):
            if violation := violation_of(name, weight, masks.on(weight.device, name)):
                problems.append(violation)
            count = weight.numel()
            weights, zeros = weights + count, zeros + count - int(weight.count_nonzero())
    if problems:
        more = f" ({len(problems) - 1} more matrices have problems)" if len(problems) > 1 else ""
        raise UserError(f"the model does not match its masks: {problems[0]}{more}")
    return {"matrices": len(masks), "weights": weights, "zeros": zeros, "sparsity": zeros / weights}

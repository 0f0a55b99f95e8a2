"""The accuracy of an image classifier: which images it answers right.

Shapes: N = images, B = images of a batch, V = classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import tasks
from pipeline.data.images import Images
from pipeline.evaluation.paired import standard_error

TOP = {"acc": 1, "acc_top5": 5}  # a right answer is among so many of the highest logits


@torch.no_grad()
def right_answers(
    model: nn.Module,
    images: Images,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda total: total,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """{"acc": [1 where the highest logit is the image's class, else 0], "acc_top5": the same for the five highest, if there
    are more classes}, equal for any number of processes."""
    task, starts = tasks.of(model.config), range(0, len(images), batch_size)
    kinds = {name: top for name, top in TOP.items() if top == 1 or top < model.config.num_labels}
    right_TN = torch.zeros(len(kinds), len(images), dtype=torch.float64)
    for start in starts[rank::world_size]:
        inputs, labels_B = task.inputs_and_labels(images[start : start + batch_size])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        order_BV = task.logits(model, inputs).sort(dim=-1, descending=True, stable=True).indices.cpu()
        hits_BV = order_BV == labels_B[:, None]
        for row, top in enumerate(kinds.values()):
            right_TN[row, start : start + len(labels_B)] = hits_BV[:, :top].any(1).double()
        report(f"{min(start + batch_size, len(images))} of {len(images)} images")
    return dict(zip(kinds, all_sum(right_TN).tolist()))


def scores(right: dict[str, list[float]]) -> dict[str, Any]:
    """The means of right answers, and their standard errors."""
    found: dict[str, Any] = {}
    for name, values in right.items():
        found[name] = sum(values) / len(values)
        if (error := standard_error(values)) is not None:
            found[f"{name}_stderr"] = error
    return found

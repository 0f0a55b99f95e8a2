"""The accuracy of an image classifier, in total and by class, and example images for the report.

Shapes: N = images, B = images of a batch, V = classes.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import tasks
from pipeline.data.images import Images
from pipeline.evaluation.paired import standard_error

TOP = {"acc": 1, "acc_top5": 5}  # an answer is right if its class is among this many highest logits
EXAMPLES, PIXELS = 12, 96  # images in the report, and their longest side


@torch.no_grad()
def right_answers(
    model: nn.Module,
    images: Images,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda total: total,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, list]:
    """{"acc": [1 where the highest logit is the image's class, else 0], "acc_top5": the same for the five highest, if there
    are more classes; "label": the images' classes, "answer": those of the highest logits}, equal for any number of
    processes."""
    task, starts = tasks.of(model.config), range(0, len(images), batch_size)
    kinds = {name: top for name, top in TOP.items() if top == 1 or top < model.config.num_labels}
    right_TN = torch.zeros(len(kinds) + 2, len(images), dtype=torch.float64)  # the last two: label and answer
    for start in starts[rank::world_size]:
        inputs, labels_B = task.inputs_and_labels(images[start : start + batch_size])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        order_BV = task.logits(model, inputs).sort(dim=-1, descending=True, stable=True).indices.cpu()
        hits_BV = order_BV == labels_B[:, None]
        for row, top in enumerate(kinds.values()):
            right_TN[row, start : start + len(labels_B)] = hits_BV[:, :top].any(1).double()
        right_TN[-2:, start : start + len(labels_B)] = torch.stack([labels_B, order_BV[:, 0]]).double()
        report(f"{min(start + batch_size, len(images))} of {len(images)} images")
    right_TN = all_sum(right_TN)
    label_N, answer_N = right_TN[-2:].long().tolist()
    return dict(zip(kinds, right_TN.tolist())) | {"label": label_N, "answer": answer_N}


def scores(right: dict[str, list]) -> dict[str, Any]:
    """The means of right answers, and their standard errors."""
    found: dict[str, Any] = {}
    for name in filter(right.__contains__, TOP):
        values = right[name]
        found[name] = sum(values) / len(values)
        if (error := standard_error(values)) is not None:
            found[f"{name}_stderr"] = error
    return found


def by_class(right: dict[str, list], names: dict[int, str]) -> list[tuple[str, int, int]]:
    """(name, right answers, images) of each class that has images. A list, because ImageNet has two classes called crane."""
    found: dict[int, list[int]] = {}
    for label, hit in zip(right["label"], right["acc"]):
        counts = found.setdefault(label, [0, 0])
        counts[0] += int(hit)
        counts[1] += 1
    return [(str(names.get(label, label)), *found[label]) for label in sorted(found)]


def chosen(right: dict[str, list[float]], count: int = EXAMPLES) -> list[int]:
    """The indices of the images to show, in order: up to half of them only the pruned model gets wrong, up to a quarter the
    pruned and the last model get wrong, and the others are spread over the rest. `right`: by model."""
    images = range(len(next(iter(right.values()))))
    lost = [place for place in images if "pruned" in right and not right["pruned"][place]]
    last = next(reversed(right.values()))
    groups = [[place for place in lost if last[place]], [place for place in lost if not last[place]]]
    taken = [place for group, most in zip(groups, (count // 2, count // 4)) for place in _spread(group, most)]
    rest = [place for place in images if place not in set(lost)]
    return sorted(taken + _spread(rest, count - len(taken)))


def _spread(places: list[int], count: int) -> list[int]:
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def examples(images: Images, answers: dict[str, dict[str, list]], names: dict[int, str]) -> list[dict[str, Any]]:
    """[{"image": a small PNG in base64, "class": its name, "answers": {model: the class it names}}] of the `chosen` images;
    `answers`: what `right_answers` returned for each model."""
    found = []
    for place in chosen({model: right["acc"] for model, right in answers.items()}):
        image, file = images.rows.image(images.places[place], images.channels), io.BytesIO()
        image.thumbnail((PIXELS, PIXELS))
        image.save(file, "PNG")
        of_models = {model: right["answer"][place] for model, right in answers.items()}
        label = next(iter(answers.values()))["label"][place]
        found.append(
            {
                "image": base64.b64encode(file.getvalue()).decode(),
                "class": str(names.get(label, label)),
                "answers": {model: str(names.get(answer, answer)) for model, answer in of_models.items()},
            }
        )
    return found

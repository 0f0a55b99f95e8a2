"""The images that are passed to the API.

Shapes: N = images, C = channels, H, W = pixels.
"""

from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from pipeline import tasks
from pipeline.data.sources import Source
from pipeline.runtime.errors import UserError

from . import inputs
from .inputs import Texts


def are_read_by(model: PreTrainedModel) -> bool:
    return not tasks.of(model.config).reads_text


def pixels(data: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """Checked pixel values, (N, C, H, W), on the CPU."""
    channels = getattr(model.config, "num_channels", 3)
    if data.dim() != 4 or data.shape[1] != channels or not data.is_floating_point() or not len(data):
        raise UserError(
            f"{name} is a {data.dtype} tensor of {tuple(data.shape)}: pixel values of (images, {channels}, height, width) "
            "are needed, as the image processor gives them"
        )
    return data.detach().cpu()


def source(data: Texts, section: str, name: str, column: str | None, mirror: str | None, split: str) -> Source:
    """A data set of images as a `Source`; `name`: the argument's."""
    if isinstance(data, list | tuple):
        raise UserError(
            f"{name} is a {type(data).__name__}: a datasets.Dataset, a data set's name, or a folder is needed"
        )
    return inputs.source(data, section, name, column, mirror, split)


def processor_of(model: PreTrainedModel, given: Any) -> Any:
    """The processor that is `given`, or that of the folder or hub repository that the model was loaded from."""
    if given is not None:
        if isinstance(given, PreTrainedTokenizerBase) or not callable(given):
            raise UserError(
                f"tokenizer is a {type(given).__name__}, and {type(model).__name__} reads images: pass its image processor"
            )
        return given
    try:
        return AutoImageProcessor.from_pretrained(model.name_or_path, backend="pil")
    except Exception as error:  # depends on the files there
        raise UserError(
            f"there is no image processor where the model was loaded from ('{model.name_or_path}'): pass tokenizer=..., its "
            "image processor"
        ) from error

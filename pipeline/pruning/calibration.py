"""This rank's batches of calibration data."""

import math
from pathlib import Path

from torch import Tensor, nn

from pipeline import tasks
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Calibration, Recipe
from pipeline.tasks.task import Samples


def batches(recipe: Recipe, text: Calibration, section: str, origin: Path, model: nn.Module) -> list[Tensor]:
    """This rank's batches of tokens, each (batch_size, seq_len), or of images. `section`: the recipe's section that sets
    `text`."""
    samples = tasks.of(model.config).calibration(recipe, text, section, origin, model.config)
    count = math.ceil(len(samples) / text.batch_size)
    smaller = text.samples // processes.world_size()
    if count < processes.world_size():  # not split here: in other shapes, products are rounded otherwise
        raise UserError(
            f"{count} batches of {section} samples cannot be shared by {processes.world_size()} processes: "
            + (f"set {section}.batch_size={smaller}, or " if smaller else "set ")
            + f"{section}.samples={text.batch_size * processes.world_size()} or more"
        )
    return split(samples, text.batch_size, processes.rank(), processes.world_size())


def split(samples: Samples, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """One process's batches, every `world_size`-th. Each batch is the same for any number of processes."""
    mine = range(0, len(samples), batch_size)[rank::world_size]
    return [samples[start : start + batch_size] for start in mine]

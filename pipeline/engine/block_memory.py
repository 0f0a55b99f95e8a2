"""The results of a walk without a folder: the weights stay in the model, masks and log rows in memory."""

from torch import nn

from pipeline.engine.block_files import BlockResult
from pipeline.engine.blocks import Block
from pipeline.models import file_names
from pipeline.sparsity.masks import Masks


class BlocksInMemory:
    """Stands for `BlockFiles`. The walk's forwards write each block back to where it was (`LayerwiseForwards.keeps`)."""

    finished_before: frozenset[int] = frozenset()

    def __init__(self, model: nn.Module) -> None:
        self.masks, self.rows = Masks(), []
        self._names = set(file_names.saved_state(model))

    def is_finished(self, block: Block) -> bool:
        return False

    def holds(self, block: Block, name: str) -> bool:
        """Whether the parameter `name` is the block's own; one that blocks share belongs to one of them."""
        return f"{block.name}.{name}" in self._names

    def write(self, block: Block, result: BlockResult) -> None:
        self.masks.packed |= result.masks.packed
        self.rows.append(result.log)

"""The results of a walk without a folder: the weights stay in the model, masks and log rows in memory."""

from torch import nn

from pipeline.engine.block_files import BlockResult, BlockStore
from pipeline.engine.blocks import Block
from pipeline.sparsity.masks import Masks


class BlocksInMemory(BlockStore):
    """Keeps masks and log rows. `LayerwiseForwards`, with `write_back`, copies changed weights back into the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.masks, self.rows = Masks(), []

    def write(self, block: Block, result: BlockResult) -> None:
        self.masks.packed |= result.masks.packed
        self.rows.append(result.log)
        # as in the tables of a run, whatever order the model runs its layers in
        self.rows.sort(key=lambda row: row["layer"])

"""Owns the walk over a model's blocks, in which a batch is a block; pruning or reconstructing it is a callback."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pipeline.engine.block_files import BlockFiles
from pipeline.engine.block_memory import BlocksInMemory
from pipeline.engine.blocks import Block, find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.matrices import Matrix
from pipeline.engine.observe import InputObserver, Observed
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.sparsity.masks import Masks


class LayerWalk(LightningModule):
    """Owns a model's blocks, and the forwards of this rank's batches, which are paused at the block at hand.

    A block that an earlier try finished, as `files` knows, is given its weights and only passed through. `in_memory`: nothing
    is written, and the model itself ends with the weights that the callbacks left. With neither, no callback may change them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        store: torch.device | None,
        folder: Path | None = None,
        in_memory: bool = False,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # not in _modules: Lightning must not move, wrap or save the model
        self.blocks = find_blocks(model)
        self.batches, self.store = batches, store
        self.tokens = sum(batch.numel() for batch in batches)
        self.files: BlockFiles | BlocksInMemory | None = None
        if folder or in_memory:
            self.files = BlockFiles(folder, model, self.blocks) if folder else BlocksInMemory(model)
        self.forwards = self.forwards_of(model, self.files)
        self.masks = Masks()  # of the block at hand
        self.log_row: dict = {}

    def is_finished(self, block: Block) -> bool:
        return self.files is not None and self.files.is_finished(block)

    def forwards_of(self, model: nn.Module, files: BlockFiles | BlocksInMemory | None = None) -> LayerwiseForwards:
        """Those of `model` over this rank's batches."""

        def call(batch_BT: Tensor) -> None:
            model.base_model(input_ids=batch_BT, use_cache=False)

        known: dict[str, Any] = {}
        if isinstance(files, BlockFiles):
            known = {"restore": files.restore, "elsewhere": files.finished_before}
        elif files:
            known = {"keeps": True}
        return LayerwiseForwards(model, find_blocks(model), call, self.batches, processes.device(), self.store, **known)

    def reached(self) -> Iterator[Block]:
        """The blocks in the order in which the model reaches them, each once. Between two of them, all batches run through
        the block at hand as it is then, and through blocks that the model calls again. What follows the last is not run."""
        left = {block.index for block in self.blocks}
        self.begun = self.ended = 0
        self.forwards.start()
        while left and (block := self.forwards.at) is not None:
            if block.index in left:
                self._check_owner(block, left)
                left.discard(block.index)
                self.begun += 1
                yield block
            if left:
                for _ in self.forwards.advance():
                    pass

    def _check_owner(self, block: Block, left: set[int]) -> None:
        """Shared weights are pruned with the first block that holds them, so it must be the first that is reached, too."""
        own = set(map(id, block.module.parameters()))
        for other in self.blocks[: block.index]:
            if other.index in left and own & set(map(id, other.module.parameters())):
                raise UserError(
                    f"{block.name} is reached before {other.name}, with which it shares weights: not understood"
                )

    def on_predict_batch_end(self, outputs, block: Block, number: int, dataloader_idx: int = 0) -> None:
        self.ended += 1

    def predict_step(self, block: Block, number: int) -> None:
        self.masks, self.log_row = Masks(), {}

    @torch.no_grad()
    def observe(self, matrices: dict[str, Matrix], observe: Callable[[Tensor], Tensor]) -> Observed:
        """What the matrices of the block at hand see, summed over all batches of all ranks, the same on each.

        An expert that no token reached has a sum of nothing. A matrix that the model never calls, such as one that is read
        by a kernel of its own, is not in `shared_input_key`.
        """
        observer = InputObserver(matrices, observe)
        for i in range(len(self.batches)):
            with observer.batch():
                self.forwards.try_on(i)
        observed, known = observer.observed, {}
        for of_rank in processes.all_ranks(observed.shared_input_key):  # an expert may be reached on some ranks alone
            known = of_rank | known
        routed = {name for name, matrix in matrices.items() if matrix.routed}
        if routed & known.keys():
            known |= {name: name for name in routed - known.keys()}
        observed.shared_input_key = {name: known[name] for name in matrices if name in known}
        for key in dict.fromkeys(observed.shared_input_key.values()):
            weight_OI = matrices[key].weight_OI
            if key not in observed.totals:
                observed.samples[key] = weight_OI.new_zeros(0, weight_OI.shape[1])
                observed.totals[key] = observe(observed.samples[key]).double()
            observed.totals[key] = processes.all_sum(observed.totals[key])
            tokens = torch.tensor(observed.tokens[key], device=weight_OI.device)
            observed.tokens[key] = int(processes.all_sum(tokens)) if matrices[key].routed else observed.tokens[key]
        return observed


class _Reached(IterableDataset):
    """As long as there are blocks, so that Lightning fetches none ahead: the next one depends on what is done to the last."""

    def __init__(self, walk: LayerWalk) -> None:
        self.walk = walk

    def __len__(self) -> int:
        return len(self.walk.blocks)

    def __iter__(self) -> Iterator[Block]:
        return self.walk.reached()


def run_layerwise(walk: LayerWalk, callbacks: list[Callback]) -> None:
    """Walks all blocks with the callbacks."""
    trainer = Trainer(
        callbacks=callbacks,
        inference_mode=False,  # else the weights become inference tensors, and a later fit of them dies
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # each layer says a line, also off a terminal
        **processes.trainer_arguments(),
    )
    assert trainer.world_size == processes.world_size()
    with walk.forwards:
        trainer.predict(walk, DataLoader(_Reached(walk), batch_size=None), return_predictions=False)
    if walk.ended != walk.begun:  # a StopIteration of whatever code: Lightning takes it for the end of the data
        raise UserError(f"the walk ended in the midst of layer {walk.begun}: something in it raised StopIteration")

"""The walk over a model's blocks: `Trainer.predict` with one block per batch; `run_layerwise` is given what to do with each."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pipeline import tasks
from pipeline.engine.block_store import BlockFiles, BlockResult, BlocksInMemory, BlockStore
from pipeline.engine.blocks import Block, find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.matrices import Matrix
from pipeline.engine.observe import InputObserver, Observed
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError

# what is done to a block; its result is passed on to the callbacks
Visit = Callable[["LayerWalk", Block], BlockResult | None]


class LayerWalk(LightningModule):
    """A model's blocks, and the paused forwards of this rank's calibration batches.

    With a `folder`, each block is written when it is done, and blocks that an earlier run finished are restored.
    `in_memory`: nothing is written, and the model ends with the weights that were changed. With neither, the weights must
    not change. `dense_outputs`: each block sees what the dense blocks before it return, not the changed ones.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        hidden_device: torch.device | None,
        folder: Path | None = None,
        in_memory: bool = False,
        dense_outputs: bool = False,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # not in _modules: Lightning must not move, wrap or save the model
        self.blocks = find_blocks(model)
        self.batches, self.hidden_device = batches, hidden_device
        self.task = tasks.of(model.config)
        self.tokens = sum(map(self.task.size, batches))  # or images
        self.results: BlockStore | None = None
        if folder or in_memory:
            self.results = BlockFiles(folder, model, self.blocks) if folder else BlocksInMemory(model)
        self.forwards = self.paused_forwards(model, self.results, dense_outputs)
        self.visit: Visit = lambda walk, block: None
        self.started = self.finished = 0  # blocks

    def is_finished(self, block: Block) -> bool:
        """Whether an earlier run finished the block."""
        return self.results is not None and self.results.is_finished(block)

    def paused_forwards(
        self, model: nn.Module, results: BlockStore | None = None, dense_outputs: bool = False
    ) -> LayerwiseForwards:
        """Paused forwards of `model` over this rank's batches."""

        def call(batch: Tensor) -> None:
            self.task.forward(model, batch)

        return LayerwiseForwards(
            model,
            find_blocks(model),
            call,
            self.batches,
            processes.device(),
            self.hidden_device,
            restore=results.restore if isinstance(results, BlockFiles) else None,
            dropped=results.finished_before if results else (),
            write_back=isinstance(results, BlocksInMemory),
            dense_outputs=dense_outputs,
        )

    def blocks_in_order(self) -> Iterator[Block]:
        """Yields each block once, in the order in which the model reaches them. Between two of them, all batches run through
        the current block as it then is, and through blocks that repeat. Nothing runs after the last one."""
        remaining = {block.index for block in self.blocks}
        self.forwards.start()
        while remaining and (block := self.forwards.current) is not None:
            if block.index in remaining:
                self._check_owner(block, remaining)
                remaining.discard(block.index)
                self.started += 1
                yield block
            if remaining:
                for _ in self.forwards.advance():
                    pass

    def _check_owner(self, block: Block, remaining: set[int]) -> None:
        """Shared weights are pruned with the first block that holds them, so that block must be reached first."""
        own = set(map(id, block.module.parameters()))
        for other in self.blocks[: block.index]:
            if other.index in remaining and own & set(map(id, other.module.parameters())):
                raise UserError(
                    f"{block.name} runs before {other.name}, with which it shares weights: this is not supported"
                )

    def on_predict_batch_end(self, outputs, block: Block, number: int, dataloader_idx: int = 0) -> None:
        self.finished += 1

    def predict_step(self, block: Block, number: int) -> BlockResult | None:
        return self.visit(self, block)

    @torch.no_grad()
    def observe(
        self,
        matrices: dict[str, Matrix],
        observe: Callable[[Tensor], Tensor],
        before_batch: Callable[[int], None] = lambda i: None,
    ) -> Observed:
        """Sums `observe(input_NI)` of each matrix of the current block over all batches and ranks; the same on each rank.
        Calls `before_batch(batch number)` before each batch.

        An expert without tokens gets a sum over nothing. A matrix that is never called (for instance because a fused kernel
        reads its weight) is absent from `shared_input_key`.
        """
        observer = InputObserver(matrices, observe)
        for i in range(len(self.batches)):
            before_batch(i)
            with observer.batch():
                self.forwards.run_block(i)
        observed = observer.observed
        key_of: dict[str, str] = {}
        tokens: Counter[str] = Counter()
        # some ranks may have no token for an expert
        for keys_of_rank, tokens_of_rank in processes.all_ranks((observed.shared_input_key, observed.tokens)):
            key_of = keys_of_rank | key_of
            tokens += tokens_of_rank
        routed = {name for name, matrix in matrices.items() if matrix.routed}
        if routed & key_of.keys():  # else a fused kernel reads all experts
            key_of |= {name: name for name in routed - key_of.keys()}
        observed.shared_input_key = {name: key_of[name] for name in matrices if name in key_of}
        for key in dict.fromkeys(observed.shared_input_key.values()):
            weight_OI = matrices[key].weight_OI
            if key not in observed.totals:
                observed.samples[key] = weight_OI.new_zeros(0, weight_OI.shape[1])
                observed.totals[key] = observe(observed.samples[key]).double()
            observed.totals[key] = processes.all_sum(observed.totals[key])
        observed.tokens = tokens
        return observed


class _BlocksInOrder(IterableDataset):
    """The walk's blocks. Iterable, so that Lightning prefetches none: the next block depends on what was done to the last."""

    def __init__(self, walk: LayerWalk) -> None:
        self.walk = walk

    def __len__(self) -> int:
        return len(self.walk.blocks)

    def __iter__(self) -> Iterator[Block]:
        return self.walk.blocks_in_order()


def run_layerwise(walk: LayerWalk, visit: Visit, callbacks: list[Callback]) -> None:
    """Calls `visit` on every block; callbacks get its result as the outputs of a batch. Raises `UserError` if the walk ends
    early."""
    walk.visit = visit
    trainer = Trainer(
        callbacks=callbacks,
        inference_mode=False,  # else the weights become inference tensors, which cannot be trained later
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # callbacks print one line per layer, also without a terminal
        **processes.trainer_arguments(),
    )
    assert trainer.world_size == processes.world_size()
    with walk.forwards:
        trainer.predict(walk, DataLoader(_BlocksInOrder(walk), batch_size=None), return_predictions=False)
    if walk.finished != walk.started:  # Lightning takes any StopIteration for the end of the data
        raise UserError(f"the walk stopped at layer {walk.started}: code that it calls raised StopIteration")

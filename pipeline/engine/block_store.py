"""Stores the weights, masks and log rows of each block that a walk has finished: in files, or in memory."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.engine.blocks import Block
from pipeline.models import file_names, model_files
from pipeline.runtime import checksums, files, processes, tensor_files
from pipeline.runtime.background import Background
from pipeline.runtime.copies import HostCopies
from pipeline.sparsity.masks import Masks


@dataclass(frozen=True)
class BlockResult:
    """The result of visiting a block: its masks (empty if it was not pruned) and its log entry."""

    masks: Masks
    log: dict


class BlockStore:
    """Where a walk stores its results. The base of `BlockFiles` (on disk) and `BlocksInMemory`."""

    finished_before: frozenset[int] = frozenset()  # the blocks that an earlier run finished

    def __init__(self, model: nn.Module) -> None:
        # a set: a dict view would keep the tensors of dropped blocks alive; a shared or tied weight has one name here
        self._names = set(file_names.saved_state(model))

    def is_finished(self, block: Block) -> bool:
        return block.index in self.finished_before

    def holds(self, block: Block, name: str) -> bool:
        """Whether parameter `name` belongs to the block; one that blocks share belongs to one of them."""
        return f"{block.name}.{name}" in self._names

    def write(self, block: Block, result: BlockResult) -> None:
        """Keeps the result of a finished block; called on every rank."""
        raise NotImplementedError

    def wait(self) -> None:
        """Waits until what this rank writes is on disk; raises the error if that failed."""

    def flush(self) -> None:
        """Waits until what all ranks write is on disk."""


class BlockFiles(BlockStore):
    """The files of a walk in `folder`: per block a weight shard and a mask file, from which the new model folder is built. A
    block counts as finished when both match their recorded checksums; `restore` loads it back.

    Written in the background while the next blocks are computed: rank `i % world_size` writes block i, one at a time, so that
    its host holds one block more. The caller must not change a block's weights after `write`."""

    def __init__(self, folder: Path, model: nn.Module, blocks: list[Block]) -> None:
        super().__init__(model)
        self.folder, self.model, self.blocks = folder, model, blocks
        # files whose names or shapes differ from the model's cannot be read back block by block
        self._converts = file_names.converts(model)
        self.finished_before = processes.from_main(self._find_finished() if processes.is_main() else frozenset())
        self._written: set[int] = set()  # by this run, on any rank
        self._writer, self._copies = Background(), HostCopies()

    def _find_finished(self) -> frozenset[int]:
        checksums.adopt(self.folder, sorted((self.folder / "masks").glob("*.json")))
        damaged = checksums.damaged(self.folder)
        if damaged:
            processes.say(f"  damaged files, whose layers are computed again: {', '.join(damaged)}")
        whole = {self.folder / name for name in checksums.recorded(self.folder) if name not in damaged}
        return frozenset(b.index for b in self.blocks if {self.shard(b.index), self.masks_file(b.index)} <= whole)

    def shard(self, index: int) -> Path:
        """The weight file of block `index`; that of the weights outside the blocks is the last."""
        count = len(self.blocks) + 1
        place = self.folder / ("layers" if self._converts else "model")
        return place / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def masks_file(self, index: int) -> Path:
        return self.folder / "masks" / f"{index:05d}.safetensors"

    def note(self, index: int) -> Path:
        """The checksums of a block's two files, written after them."""
        return self.folder / "masks" / f"{index:05d}.json"

    def write(self, block: Block, result: BlockResult) -> None:
        """Starts to write the weights and masks of a finished block, on one rank. Waits for the block that this rank wrote
        before, whose error it raises."""
        self._written.add(block.index)
        if block.index % processes.world_size() != processes.rank():
            self._writer.check()
            return
        self._writer.wait()  # its copies are freed before others are made
        copies = self._copies.take(self._state(block))
        self._writer.start(functools.partial(self._write, block.index, result, *copies))

    def _write(self, index: int, result: BlockResult, state: dict[str, Tensor], arrived: Callable[[], None]) -> None:
        try:
            masks, shard = self.masks_file(index), self.shard(index)
            result.masks.save(masks, result.log)
            arrived()
            known = {masks: files.sha256(masks), shard: tensor_files.save(state, shard)}
            checksums.note(self.folder, self.note(index), known)
        finally:
            state.clear()  # the thread may hold it for longer

    def wait(self) -> None:
        self._writer.wait()

    def flush(self) -> None:
        self.wait()
        processes.barrier()

    def restore(self, block: Block) -> None:
        """Loads the block's weights, as a lazy view of the file."""
        if block.index in self._written:  # reached again; all ranks are here
            self.flush()
        weights = load_file(self.shard(block.index))
        for name, parameter in block.module.named_parameters():
            weight = weights.get(f"{block.name}.{name}")
            if weight is not None:  # else shared with another block, whose shard holds it
                parameter.data = weight

    def write_remaining(self, origin: Path, dtype: str) -> None:
        """Completes the model folder: blocks that were never reached, the weights outside the blocks, the index, and from
        `origin` all other files (config, tokenizer). Called on one rank, after `flush` on all."""
        checksums.adopt(self.folder, map(self.note, self._written))
        reached = self._reached()
        for block in self.blocks:
            if block.index not in reached:
                processes.say(f"  {block.name} stays dense: the model never reaches it with calibration text")
                self._save(block.index, self._state(block))
        inside = tuple(f"{block.name}." for block in self.blocks)
        rest = {
            name: t
            for name, t in self.model.state_dict().items()
            if name in self._names and not name.startswith(inside)
        }
        self._save(len(self.blocks), rest)
        target = self.folder / "model"
        if self._converts:
            for index in range(len(self.blocks) + 1):
                path = self.shard(index)
                _save(file_names.to_files(self.model, load_file(path)), target / path.name)
        model_files.write_index(target)
        model_files.copy_other_files(origin, target, dtype)

    def logs(self) -> list[dict]:
        """The log rows saved with the masks of each block that was reached."""
        return [Masks.load(path).log for path in self.masks_files()]

    def masks_files(self) -> list[Path]:
        """The mask files of all finished blocks, in block order."""
        return [self.masks_file(index) for index in sorted(self._reached())]

    def _reached(self) -> set[int]:
        # not what exists: another machine's files may become visible here only after a while
        return self._written | self.finished_before

    def _state(self, block: Block) -> dict[str, Tensor]:
        state = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name in self._names}

    def _save(self, index: int, state: dict[str, Tensor]) -> None:
        _save(state, self.shard(index))


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


def _save(state: dict[str, Tensor], path: Path) -> None:
    tensor_files.save({name: tensor.cpu() for name, tensor in state.items()}, path)

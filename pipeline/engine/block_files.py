"""Writes the weights and masks of each block that a walk has finished, and builds the new model folder from them."""

import csv
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.engine.blocks import Block
from pipeline.models import file_names, model_files
from pipeline.runtime import checksums, files, processes
from pipeline.sparsity.masks import Masks


@dataclass(frozen=True)
class BlockResult:
    """What was done to a block: its masks, where it was pruned, and what is logged of it."""

    masks: Masks
    log: dict


class BlockStore:
    """Where a walk leaves its results."""

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
        """Keeps the result of a finished block."""
        raise NotImplementedError


class BlockFiles(BlockStore):
    """The files of a walk in `folder`: per block a weight shard and a mask file. A block counts as finished when both match
    their recorded checksums; `restore` loads it back."""

    def __init__(self, folder: Path, model: nn.Module, blocks: list[Block]) -> None:
        super().__init__(model)
        self.folder, self.model, self.blocks = folder, model, blocks
        # files whose names or shapes differ from the model's cannot be read back block by block
        self._converts = file_names.converts(model)
        self.finished_before = processes.from_main(self._find_finished() if processes.is_main() else frozenset())

    def _find_finished(self) -> frozenset[int]:
        damaged = checksums.damaged(self.folder)
        if damaged:
            processes.say(f"  damaged files, to be made again: {', '.join(damaged)}")
        whole = {self.folder / name for name in checksums.recorded(self.folder) if name not in damaged}
        return frozenset(b.index for b in self.blocks if {self.shard(b.index), self.masks_file(b.index)} <= whole)

    def shard(self, index: int) -> Path:
        """The weight file of block `index`; that of the weights outside the blocks is the last."""
        count = len(self.blocks) + 1
        place = self.folder / ("layers" if self._converts else "model")
        return place / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def masks_file(self, index: int) -> Path:
        return self.folder / "masks" / f"{index:05d}.safetensors"

    def write(self, block: Block, result: BlockResult) -> None:
        """Writes the weights and masks of a finished block, with checksums."""
        result.masks.save(self.masks_file(block.index), result.log)
        self._save(block.index, self._state(block))
        checksums.record(self.folder, self.masks_file(block.index), self.shard(block.index))

    def restore(self, block: Block) -> None:
        """Loads the block's weights, as a lazy view of the file."""
        weights = load_file(self.shard(block.index))
        for name, parameter in block.module.named_parameters():
            weight = weights.get(f"{block.name}.{name}")
            if weight is not None:  # else shared with another block, whose shard holds it
                parameter.data = weight

    def write_remaining(self, origin: Path, dtype: str) -> None:
        """Completes the model folder: blocks that were never reached, the weights outside the blocks, the index, and from
        `origin` all other files (config, tokenizer)."""
        for block in self.blocks:
            if not self.shard(block.index).exists():
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
        return [path for block in self.blocks if (path := self.masks_file(block.index)).exists()]

    def _state(self, block: Block) -> dict[str, Tensor]:
        state = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name in self._names}

    def _save(self, index: int, state: dict[str, Tensor]) -> None:
        _save(state, self.shard(index))


def _save(state: dict[str, Tensor], path: Path) -> None:
    with files.atomic_write(path) as tmp:
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, tmp, {"format": "pt"})


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a CSV with the columns layer and matrix first; nothing if there are no rows."""
    if not rows:
        return
    columns = sorted(rows[0], key=("layer", "matrix").__contains__, reverse=True)
    with files.atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

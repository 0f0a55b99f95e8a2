"""Owns what a walk writes: the weights and masks of each block as it is finished, and from them the new model folder."""

import csv
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.engine.blocks import Block
from pipeline.models import file_names, model_files
from pipeline.runtime import checksums, files, processes
from pipeline.sparsity.masks import Masks


class BlockFiles:
    """In `folder`, the weights of block i as a shard and its masks as a file. A block that an earlier try finished has both,
    whole as they were recorded; it is read back with `restore`."""

    def __init__(self, folder: Path, model: nn.Module, blocks: list[Block]) -> None:
        self.folder, self.model, self.blocks = folder, model, blocks
        # a set: the view of a dict would keep its tensors, and so the weights of blocks that are dropped; a shared or tied
        # weight has one of its names here
        self._names = set(file_names.saved(model))
        # files that name or cut the weights otherwise than the model does cannot be read back block by block
        self._converts = file_names.converts(model)
        self.finished_before: frozenset[int] = processes.from_main(self._find() if processes.is_main() else frozenset())

    def _find(self) -> frozenset[int]:
        damaged = checksums.damaged(self.folder)
        if damaged:
            processes.say(f"  damaged, so made again: {', '.join(damaged)}")
        whole = {self.folder / name for name in checksums.recorded(self.folder) if name not in damaged}
        return frozenset(b.index for b in self.blocks if {self.shard(b.index), self.masks_file(b.index)} <= whole)

    def shard(self, index: int) -> Path:
        count = len(self.blocks) + 1
        place = self.folder / ("layers" if self._converts else "model")
        return place / f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def masks_file(self, index: int) -> Path:
        return self.folder / "masks" / f"{index:05d}.safetensors"

    def is_finished(self, block: Block) -> bool:
        return block.index in self.finished_before

    def holds(self, block: Block, name: str) -> bool:
        """Whether the shard of a block holds its parameter `name`; one that blocks share has its place in one of them."""
        return f"{block.name}.{name}" in self._names

    def write(self, block: Block, masks: Masks, log: dict) -> None:
        masks.save(self.masks_file(block.index), log)
        self._save(block.index, self._state(block))
        checksums.record(self.folder, self.masks_file(block.index), self.shard(block.index))

    def restore(self, block: Block) -> None:
        """Gives the block its weights back, as a lazy view of the file."""
        weights = load_file(self.shard(block.index))
        for name, parameter in block.module.named_parameters():
            weight = weights.get(f"{block.name}.{name}")
            if weight is not None:  # else another block's, with which it is shared
                parameter.data = weight

    def write_rest(self, origin: Path, dtype: str) -> None:
        """What else makes a model folder: blocks that the model never reached, all that lies outside the blocks, the index,
        and what is no weight, from the folder `origin`."""
        for block in self.blocks:
            if not self.shard(block.index).exists():
                processes.say(f"  stays dense, for the model never reaches it with calibration text: {block.name}")
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
        model_files.copy_beside(origin, target, dtype)

    def logs(self) -> list[dict]:
        """What was logged with the masks of each block that was reached."""
        return [Masks.load(path).log for path in self.masks_files()]

    def masks_files(self) -> list[Path]:
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
    """As CSV, layer and matrix first; no file without a row."""
    if not rows:
        return
    columns = sorted(rows[0], key=("layer", "matrix").__contains__, reverse=True)
    with files.atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

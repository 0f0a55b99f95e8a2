"""Owns the checkpoints of a training: written whole, with a checksum, and found again."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pipeline.runtime import checksums, files, processes


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own way builds the file in the system's temporary folder and moves it: on another disk that is a copy,
    which a kill leaves half done. `folder` is the stage's, which holds the checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        with files.atomic_write(path) as tmp:
            try:
                torch.save(checkpoint, tmp)
            except RuntimeError as error:  # torch's way of saying that the disk is full
                raise OSError(f"{error} (is the disk full?)") from error
        checksums.record(self.folder, path)


def newest(folder: Path) -> Path | None:
    """The last checkpoint in `folder/checkpoints` that is whole, as all ranks know it; a damaged one is named."""
    return processes.from_main(_newest(folder) if processes.is_main() else None)


def _newest(folder: Path) -> Path | None:
    for path in sorted((folder / "checkpoints").glob("*.ckpt"), key=_step, reverse=True):
        if checksums.is_whole(folder, path):
            return path
        processes.say(f"  {path.name} is damaged or was not written whole: going on from the one before it")
        path.unlink()
    return None


def _step(path: Path) -> int:
    return int(path.stem.rpartition("=")[2])

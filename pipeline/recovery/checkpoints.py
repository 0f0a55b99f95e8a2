"""Training checkpoints: written atomically with a checksum, and the newest intact one found again."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pipeline.runtime import checksums, files, processes


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically. Lightning builds the file in the system's temporary folder and moves it: to another disk
    that is a copy, which a kill leaves half done. `folder`: the stage's work folder, which holds the checksums."""

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


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint in `folder/checkpoints`, the same on all ranks; deletes damaged ones and says so."""
    return processes.from_main(_newest_checkpoint(folder) if processes.is_main() else None)


def _newest_checkpoint(folder: Path) -> Path | None:
    for path in sorted((folder / "checkpoints").glob("*.ckpt"), key=step_of, reverse=True):
        if checksums.is_whole(folder, path):
            return path
        processes.say(f"  {path.name} is damaged or incomplete: resuming from the one before it")
        path.unlink()
    return None


def step_of(path: Path) -> int:
    return int(path.stem.rpartition("=")[2])

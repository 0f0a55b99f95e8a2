"""Writes each finished layer as a shard of the new model folder, so that a killed run goes on where it stopped."""

from pathlib import Path

from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file

from pipeline import checksums, files


class LayerWriter(BasePredictionWriter):
    """A layer is finished when the checksums of its masks and of its weights are recorded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(
        self, trainer, walk, prediction, batch_indices, layer, index: int, dataloader_idx: int
    ) -> None:
        if trainer.is_global_zero and not walk.is_finished(index):
            walk.masks.save(walk.masks_file(index), walk.log_row)
            shard = {f"{walk.decoder.prefix}.{index}.{k}": v.contiguous().cpu() for k, v in layer.state_dict().items()}
            with files.whole(walk.shard(index)) as beside:
                save_file(shard, beside, {"format": "pt"})
            checksums.record(self.folder, walk.masks_file(index), walk.shard(index))

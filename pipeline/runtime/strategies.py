"""Lightning strategies that use the launcher's device, wait on the host, and leave the trained model on its device."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from pipeline.runtime import launcher, processes


class StaysOnDevice(Strategy):
    """Does not move the model and the optimizer to the host at the end, as Lightning does: merging and checking 7B weights
    took minutes there."""

    def teardown(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()  # not needed after training
        self.optimizers = []
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


class OneDevice(StaysOnDevice, SingleDeviceStrategy):
    """For a single process."""


class Parallel(StaysOnDevice):
    """One process per device. The launcher chooses the device, because a process that sees only one GPU has device 0 at any
    local rank."""

    @property
    def root_device(self) -> torch.device:
        return launcher.device()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        processes.barrier()


def devices() -> list[torch.device]:
    """One device for each process of this machine. Lightning only counts those of the other processes."""
    return [launcher.device()] * launcher.local_world_size()


class DataParallel(Parallel, DDPStrategy):
    """DDP: each process has all weights."""

    def __init__(self, timeout: timedelta) -> None:
        # All ranks compute the same buffers, so broadcasting them is not needed. Gradients that are views of DDP's buckets
        # save four bytes per trained weight.
        super().__init__(
            parallel_devices=devices(), timeout=timeout, broadcast_buffers=False, gradient_as_bucket_view=True
        )

"""Lightning's strategies as a run of ours needs them: on the launcher's device, waiting on the host, and leaving the trained
model where it is."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from pipeline.runtime import launcher, processes


class StaysOnDevice(Strategy):
    """Lightning's teardown takes model and optimizer to the host, where merge and check of 7B weights took minutes."""

    def teardown(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()  # nothing follows that needs it
        self.optimizers = []
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


class OneDevice(StaysOnDevice, SingleDeviceStrategy):
    """A process alone."""


class Parallel(StaysOnDevice):
    """One process a device. A task may see its own GPU only, so the device is not found by the local rank."""

    @property
    def root_device(self) -> torch.device:
        return launcher.device()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        processes.barrier()


def devices() -> list[torch.device]:
    """One for each process of this machine; all but this process's are only counted."""
    return [launcher.device()] * launcher.local_world_size()


class DataParallel(Parallel, DDPStrategy):
    """Whole weights on each process."""

    def __init__(self, timeout: timedelta) -> None:
        # Every rank's buffers are made from the same files and steps: nothing to broadcast before each forward. Gradients as
        # views of DDP's buckets save four bytes a trained weight.
        super().__init__(
            parallel_devices=devices(), timeout=timeout, broadcast_buffers=False, gradient_as_bucket_view=True
        )

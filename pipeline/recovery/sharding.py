"""FSDP2: shards a model over the processes, saves its trained parameters, and gathers tensors."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.engine.blocks import find_blocks, shared_parameters
from pipeline.recovery.training_dtype import in_float32
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.strategies import Parallel, devices


class ShardedStrategy(Parallel, ModelParallelStrategy):
    """FSDP2 over all processes. A checkpoint is one file with only the trained parameters."""

    def __init__(self, count: int, timeout: timedelta) -> None:
        super().__init__(count, 1, save_distributed_checkpoint=False, timeout=timeout)
        self.parallel_devices = devices()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        # Lightning's default also gathers the frozen weights, which are 140 GB on one host for 70B
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def shard_(model: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None = None, float32: bool = False) -> None:
    """Shards `model` in place. The units are the decoder layers; each is gathered for its call and freed afterwards.

    `compute`: gathers weights in this dtype and reduces gradients in float32. Without it, autocast keeps an unsharded 16-bit
    copy of each trained weight for backward. `float32`: converts the weights to float32, one layer at a time.

    Raises `UserError` if layers share weights, which FSDP2 does not support.
    """
    if isinstance(model, FSDPModule):
        return
    blocks = find_blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if shared_parameters(blocks):
        raise UserError("finetune.strategy=fsdp does not support layers that share weights: set finetune.strategy=ddp")
    policy = MixedPrecisionPolicy(compute, torch.float32) if compute else MixedPrecisionPolicy()
    for module in [*(block.module for block in blocks), model]:
        if float32:
            in_float32(module)
        fully_shard(module, mesh=mesh, mp_policy=policy)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on every rank. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of a full `tensor`, sharded like `parameter`, which has the same shape."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    device = parameter.to_local().device
    return distribute_tensor(
        tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, gathered on the host of rank 0; empty on the other ranks. All ranks must call it."""
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = full_tensor(parameter.detach())
            if processes.is_main():
                gathered[name] = whole.cpu().contiguous()
    return gathered

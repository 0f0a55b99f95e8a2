"""Owns a model that is shared out over the processes (FSDP2): how it is sharded, saved, and put together again."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.engine.blocks import find_blocks, shared_parameters
from pipeline.runtime.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints in one file that holds only what trains."""

    def __init__(self, processes: int, timeout: timedelta) -> None:
        super().__init__(processes, 1, save_distributed_checkpoint=False, timeout=timeout)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        # Lightning's own would gather the frozen weights as well: 140 GB on one host for 70B
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def shard_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Each decoder layer is one unit: gathered when it is called, let go of afterwards. `UserError` where two layers hold the
    same weights, which FSDP2 cannot do."""
    if isinstance(model, FSDPModule):
        return
    blocks = find_blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if shared_parameters(blocks):
        raise UserError(
            "finetune.strategy=fsdp cannot share out layers that hold the same weights: set finetune.strategy=ddp"
        )
    for block in blocks:
        fully_shard(block.module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together on every rank; all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole `tensor` that belongs to this rank's part of a `parameter` of the same shape."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    device = parameter.to_local().device
    return distribute_tensor(
        tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What trains, put together, on the CPU; all ranks must call."""
    named = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: whole(p).cpu().contiguous() for name, p in named}

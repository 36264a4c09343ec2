"""One set of weights for several processes: DDP ([1]) keeps all of them in every process, FSDP2
([2]) a shard; both average the gradients.

[1] Li et al. PyTorch Distributed: Experiences on Accelerating Data Parallel Training. 2020.
    arXiv:2006.15704
[2] Zhao et al. PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel. 2023.
    arXiv:2304.11277
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minidiff.training import ranks
from minidiff.training.bins import Loss
from minidiff.training.config import TrainConfig


class _Objective(nn.Module):
    """A loss function as a module, which is what DDP and FSDP watch. In its module are the weights;
    it may use others, which are not trained."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any], Loss]):
        super().__init__()
        self.module, self.loss_fn = (
            module,
            (loss_fn,),
        )  # in a tuple, a module's weights stay its own

    def forward(self, batch: Any) -> Loss:
        return self.loss_fn[0](batch)


class Joint:
    """A loss function whose gradients are averaged over all processes, once a step: in the backward
    pass of its last batch."""

    def __init__(self, objective: DistributedDataParallel | FSDPModule, batches: int):
        """batches: of a step, that are computed here."""
        self.objective, self.batches, self.calls = objective, batches, 0

    def __call__(self, batch: Any) -> Loss:
        self.calls += torch.is_grad_enabled()
        last = self.calls % self.batches == 0
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last)
        else:
            self.objective.require_backward_grad_sync = last  # as DDP.no_sync does
        return self.objective(batch)


def joint(
    loss_fn: Callable[[Any], Loss],
    module: nn.Module,
    config: TrainConfig,
    average: nn.Module | None,
) -> Joint:
    """See distributed.joint."""
    batches = config.accumulate * config.pieces
    own = batches if batches % ranks.size() else batches // ranks.size()
    objective = _Objective(module, loss_fn)
    if not config.shard:
        options = {"broadcast_buffers": False, "find_unused_parameters": True}
        options["gradient_as_bucket_view"] = True  # or DDP's buckets hold every gradient once more
        warnings.filterwarnings("ignore", "find_unused_parameters")  # and there was none
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # it has no successor yet
        return Joint(DistributedDataParallel(objective, **options), own)
    if average is not None:
        _sharded(_Objective(average, loss_fn))
    return Joint(_sharded(objective), own)


def _sharded(objective: _Objective) -> FSDPModule:
    device = next(objective.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.size(),))
    for block in blocks(objective.module):
        fully_shard(block, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the networks, the inner ones first: each is gathered when it is
    called, and freed afterwards."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = [part for part_list in lists if part_list is not module for part in part_list]
    return [part for part in reversed(blocks) if type(part).forward is not nn.Module.forward]


def whole(value: Any) -> Any:
    """A tensor in shards put together, on the CPU; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value: Tensor, other: Tensor) -> Tensor:
    """The value in shards, if the other is."""
    if not isinstance(other, DTensor):
        return value
    value = value.to(other.device)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)

"""Several processes train one model, by PyTorch's torch.distributed; torchrun starts them.

Every process runs the same program, with the same seeds. A step's batches are the same at any
number of processes, and each computes a part of them, so that N processes do what one does. PyTorch
averages the gradients (joint.py).
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from minidiff.errors import UserError
from minidiff.training import ranks
from minidiff.training.bins import Loss
from minidiff.training.config import TrainConfig

PATIENCE = timedelta(hours=6)  # the first process may measure or write while the others wait


def join() -> None:
    """Meet the other processes; each takes a GPU of its own."""
    if ranks.size() == 1 or dist.is_initialized():
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://"))
    # torchrun may keep its store over a restart, with the addresses of the dead. Only on one
    # machine do all processes count restarts alike.
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    """Close the connections while Python still runs: Gloo's threads may abort a process that ends
    with them open, and its exit code is lost (pull request 179291 of PyTorch). Not after a crash,
    and not on GPUs, where NCCL may wait for the others."""
    if dist.is_initialized() and not (hasattr(sys, "last_value") or torch.cuda.is_available()):
        dist.destroy_process_group()


@contextmanager
def main_first() -> Iterator[None]:
    """A with block for the first process, and then for the others, who read what it wrote. Its
    UserError is everybody's."""
    join()
    if not ranks.is_main() and (message := from_main(None)):
        raise UserError(message)
    try:
        yield
    except UserError as error:
        if ranks.is_main():
            from_main(str(error))
        raise
    if ranks.is_main():
        from_main("")


def from_main(value: Any) -> Any:
    """The first process's value, for every process: its tensors come one by one, on the CPU."""
    if ranks.size() == 1:
        return value
    leaves, tree = tree_flatten(value)
    shapes = [leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    told = [shapes, tree]
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    shapes, tree = told
    for k, shape in enumerate(shapes):
        if isinstance(shape, Tensor):
            shapes[k] = torch.empty_like(shape, device="cpu")
            if ranks.is_main():
                shapes[k] = leaves[k].cpu().contiguous()
            dist.broadcast(shapes[k], 0)
    return tree_unflatten(shapes, tree)


def own_folder(folder: Path | None) -> Path | None:
    """The folder, unless it is the first process's, which alone writes there."""
    of_main = from_main(folder)
    return folder if ranks.is_main() or folder != of_main else None


def share(batches: list[Any]) -> list[Any]:
    """This process's part of the batches of a step: one in so many, or else rows of each. Random
    numbers that are drawn from here on are its own."""
    size = ranks.size()
    if size > 1:
        torch.manual_seed(torch.initial_seed() + ranks.rank())
    return batches[ranks.rank() :: size] if len(batches) % size == 0 else list(map(_rows, batches))


def _rows(batch: Any) -> Any:
    """This process's rows of every tensor and list in a batch."""
    if isinstance(batch, dict):
        return {name: _rows(value) for name, value in batch.items()}
    if isinstance(batch, tuple):
        parts = map(_rows, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if isinstance(batch, list) and batch and isinstance(batch[0], tuple):  # of groups
        return list(map(_rows, batch))
    if not isinstance(batch, list) and not (isinstance(batch, Tensor) and batch.ndim):
        return batch
    count, rest = divmod(len(batch), ranks.size())
    if rest:
        remedy = "take a batch, or batches in a step, that they divide"
        raise UserError(f"{ranks.size()} processes cannot share {len(batch)} examples; {remedy}.")
    return batch[ranks.rank() * count : (ranks.rank() + 1) * count]


def joint(
    loss_fn: Callable[[Any], Loss],
    module: nn.Module,
    config: TrainConfig,
    average: nn.Module | None = None,
) -> Callable[[Any], Loss]:
    """loss_fn, for a module that all processes train. With config.shard, shards take the place of
    its parameters, and of its average's."""
    if ranks.size() == 1:
        return loss_fn
    join()
    from minidiff.training import joint  # a second of imports

    return joint.joint(loss_fn, module, config, average)


def gathered(losses: list[Loss]) -> list[Loss]:
    """The losses of all processes, which compute as many each."""
    if ranks.size() == 1:
        return losses
    names = list(losses[0])
    parts = [torch.cat([each[name] for each in losses]).float() for name in names]
    own, sizes = torch.cat([part.to(parts[0].device) for part in parts]), list(map(len, parts))
    all_own = [torch.empty_like(own) for _ in range(ranks.size())]
    dist.all_gather(all_own, own)
    return [dict(zip(names, each.split(sizes), strict=True)) for each in all_own]


def largest(number: int) -> int:
    """The largest of all processes' numbers; no GPU is waited for."""
    if ranks.size() == 1:
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def whole(state: Any) -> Any:
    """The same with the tensors that are in shards put together, on the CPU."""
    if ranks.size() == 1:
        return state
    from minidiff.training import joint

    return tree_map(joint.whole, state)


def put_in(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict whose tensors are whole."""
    own = module.state_dict()
    module.load_state_dict({name: like(value, own.get(name)) for name, value in state.items()})


def like(value: Tensor, other: Tensor | None) -> Tensor:
    """The value in shards, if the other is and has its shape."""
    if ranks.size() == 1 or other is None or value.shape != other.shape:
        return value
    from minidiff.training import joint

    return joint.like(value, other)

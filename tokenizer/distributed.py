"""The only things that models ask of other processes: whether there are any, and what is a mean over all of them."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over all processes, each of whose losses depends on it: so their gradients are averaged too.

    Every process must call it, equally often.
    """
    return _MeanOverProcesses.apply(x) if is_distributed() else x


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()

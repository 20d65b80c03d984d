"""The only thing that models ask of other processes: whether there are any, with which statistics must be equal."""

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

"""Whether there are other processes, with which statistics must be made equal: the only thing models ask of them."""

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

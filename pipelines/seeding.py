"""Random numbers of one's own, which leave torch's global generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators of the CPU and of `device` while the block runs, then gives their states back."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type="cuda" if device.type == "cpu" else device.type):
        # not torch.manual_seed, which would seed the devices that are not forked too
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            module = torch.get_device_module(accelerator)
            with module.device(accelerator) if hasattr(module, "device") else nullcontext():
                module.manual_seed(seed)
        yield

"""Images that several processes draw together: each makes its share, the first one receives them all."""

import os

import torch
from torch import Tensor

from pipelines.drawing import one_generator_each
from pipelines.launch import end_with_the_launcher
from pipelines.scripting import choose_device


class Shards:
    """The place of this process among those that a launcher started; alone, it does everything.

    Args:
        device: where a process that is alone computes; default an accelerator if there is one. Of several processes,
            each takes its own.
    Raises:
        ValueError: several processes were launched that do not know of each other, or all on one named device.
    """

    def __init__(self, device: str | None = None):
        self.num_processes, self.index = int(os.environ.get("WORLD_SIZE", "1")), 0
        if self.num_processes == 1:
            self.device = choose_device(device)
            return
        if device is not None:
            raise ValueError(f"of {self.num_processes} processes each takes its own device; leave --device out")
        from accelerate import PartialState

        end_with_the_launcher()
        state = PartialState(cpu=not torch.accelerator.is_available())
        if state.num_processes != self.num_processes:
            raise ValueError(
                f"{self.num_processes} processes were launched, but accelerate sees {state.num_processes}: each would "
                "write the same file. On CPUs, set ACCELERATE_USE_CPU=true, and accelerate launch --multi_gpu"
            )
        self.index, self.device = state.process_index, state.device

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, num_items: int) -> list[int]:
        """Indices of this process's items; the last one stands in where there are none left, so that all are equal."""
        size = -(-num_items // self.num_processes)
        return [min(self.index * size + place, num_items - 1) for place in range(size)]

    def generators(self, num_items: int, seed: int) -> list[torch.Generator]:
        """The generators of this process's items, out of those that one of this seed gives to each of all items."""
        each = one_generator_each(num_items, torch.Generator().manual_seed(seed))
        # made anew: two entries of a share may stand for one item, and must not advance the same generator
        return [torch.Generator().manual_seed(each[i].initial_seed()) for i in self.share(num_items)]

    def gather(self, shares: Tensor, num_items: int) -> Tensor:
        """All items in their order, on every process, from each process's tensor of its share."""
        if self.num_processes == 1:
            return shares
        from accelerate.utils import gather

        return gather(shares.to(self.device).contiguous())[:num_items].cpu()

"""Which images a step sees, as a function of the step: nothing to save, nothing to restore."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset


class StepBatches:
    """The keys of each batch as a function of the step: (index, epoch) pairs of this process's micro-batches.

    The data set is walked in a new order each epoch, epochs joined end to end, so that every batch is full and every
    image comes once per epoch.

    Args:
        length: images in the data set.
        batch_size: images per step over all processes and micro-batches.
        num_micro_batches: gradient accumulation steps.
    Raises:
        ValueError: the batch cannot be divided evenly, or is larger than the data set.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        num_micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        start_step: int = 0,
        total_steps: int,
    ):
        shares = num_micro_batches * num_processes
        if batch_size % shares:
            raise ValueError(
                f"batch_size = {batch_size} cannot be divided over {num_processes} processes x "
                f"{num_micro_batches} micro-batches; take a multiple of {shares}"
            )
        if batch_size > length:
            raise ValueError(
                f"batch_size = {batch_size} is larger than the data set of {length} images; take at most that"
            )
        self.length, self.batch_size, self.num_micro_batches = length, batch_size, num_micro_batches
        self.process_index, self.num_processes, self.seed = process_index, num_processes, seed
        self.start_step, self.total_steps = start_step, total_steps
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, self.total_steps):
            for micro_batch in range(self.num_micro_batches):
                yield self.keys(step, micro_batch)

    def keys(self, step: int, micro_batch: int) -> list[tuple[int, int]]:
        share = self.batch_size // (self.num_micro_batches * self.num_processes)
        start = step * self.batch_size + (micro_batch * self.num_processes + self.process_index) * share
        return [self._key(position) for position in range(start, start + share)]

    def epoch(self, step: int) -> int:
        """The epoch that a step's first image belongs to."""
        return step * self.batch_size // self.length

    def _key(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            # A batch spans two epochs at most
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._orders[epoch] = torch.randperm(self.length, generator=generator).tolist()
        return self._orders[epoch][place], epoch


def derived_seed(*parts) -> int:
    """A seed that is a function of all its parts, and unrelated for neighbouring ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def read_batch(dataset: Dataset, keys: Iterable) -> dict:
    """A whole batch of a data set that has `__getitems__` and `collate`, as a loader would make it."""
    return dataset.collate(dataset.__getitems__(list(keys)))


def to_device(batch, device: torch.device):
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return tuple(to_device(value, device) for value in batch)

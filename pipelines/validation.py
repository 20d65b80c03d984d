"""What an objective is on a whole data set."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipelines.batches import read_batch, to_device
from pipelines.objectives import Objective
from prior.base import evaluating
from prior.float64 import in_float64


@torch.no_grad()
def validate(accelerator: Accelerator, module: nn.Module, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Mean over `dataset` of an objective's values per image, and its summary; the same numbers on all processes.

    Each process takes every num_processes-th image.
    """
    objective: Objective = accelerator.unwrap_model(module)
    indices = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    size = max(1, batch_size // accelerator.num_processes)
    passes = math.ceil(math.ceil(len(dataset) / accelerator.num_processes) / size)
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    sums: dict[str, Tensor] = {}

    def add(part: range, weight: int) -> None:
        batch = read_batch(dataset, part)
        for name, value in module(to_device(batch, accelerator.device)).items():
            sums[name] = sums.get(name, 0) + weight * in_float64(value).sum()

    with evaluating(module):
        for _ in range(passes - len(parts)):  # sharded models need equally many passes on every process
            add(range(1), weight=0)
        objective.start_evaluation()
        for part in parts:
            add(part, weight=1)
        means = {name: (accelerator.reduce(total, "sum") / len(dataset)).item() for name, total in sums.items()}
        return means | objective.summary()

"""Takes memory on request; a module of its own, light enough for processes that measure it."""

from collections.abc import Callable

import torch

MEGABYTES = 2**20


def allocation(megabytes: int) -> Callable:
    """A function that holds so many megabytes while it runs."""
    if megabytes < 0:
        raise RuntimeError("less than nothing")
    return lambda: torch.ones(megabytes * MEGABYTES // 4).sum()

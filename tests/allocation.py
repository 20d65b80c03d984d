"""What takes memory, on request; a module of its own, light enough for processes that measure it."""

from collections.abc import Callable

import torch

from tokenizer.quantizers import EMAVQ

MEGABYTES = 2**20


def allocation(megabytes: int) -> Callable:
    """A function that holds so many megabytes while it runs."""
    if megabytes < 0:
        raise RuntimeError("less than nothing")
    return lambda: torch.ones(megabytes * MEGABYTES // 4).sum()


def training_pass(num_vectors: int, codebook_size: int, code_dim: int) -> Callable:
    """A forward and a backward pass of a quantizer."""
    quantizer = EMAVQ(codebook_size, code_dim, init="normal")
    features = torch.randn(1, code_dim, 1, num_vectors, requires_grad=True)

    def run():
        out = quantizer(features)
        (out.z.sum() + out.losses["commitment"]).backward()

    return run

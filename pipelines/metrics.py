"""Numbers that models are compared by, as functions of tensors."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prior.base import Codes, CodeSpec
from prior.float64 import in_float64


class NotMeasurableError(ValueError):
    """A number cannot be had of this model, of these data or on this machine; the message says why and what helps."""


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    """Nats per image -> bits per pixel and channel."""
    return nats / (num_dims * math.log(2))


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) in dB, for images in [0, 1]; at most 100 dB (equal images)."""
    return -10 * torch.log10(squared_error(images, targets).clamp_min(1e-10))


def squared_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean over pixels and channels, (B,)."""
    return (images - targets).square().flatten(1).mean(dim=1)


def codebook_usage(counts: Tensor) -> float:
    """The fraction of codes that occur, from counts (K,)."""
    return in_float64(counts > 0).mean().item()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' empirical distribution, from counts (K,): between 1 and K; nan without codes."""
    if counts.sum() == 0:
        return math.nan
    counts = in_float64(counts)
    probabilities = counts / counts.sum()
    return torch.special.entr(probabilities).sum().exp().item()


# A codebook of at least this many entries has collapsed below these fractions of usage or of the largest perplexity
SMALLEST_CODEBOOK = 16
COLLAPSED_USAGE = 0.1
COLLAPSED_PERPLEXITY = 0.05
# Entries of a codebook whose uses are counted: the tables of more would not fit into memory
MOST_COUNTED = 2**26


def has_collapsed(counts: Tensor) -> bool:
    """Whether hardly any codes occur, from counts (K,); False where too few codes were counted to tell."""
    size = len(counts)
    if size < SMALLEST_CODEBOOK or counts.sum() < 4 * size:
        return False
    return codebook_usage(counts) < COLLAPSED_USAGE or perplexity(counts) < COLLAPSED_PERPLEXITY * size


class CodeCounts(nn.Module):
    """How often each code of each level occurred, over all processes.

    Levels of real numbers are left out, and those of more than `MOST_COUNTED` values.

    Counts are gathered by `add` in each process and become common to all in `merge`.
    """

    def __init__(self, spec: CodeSpec):
        super().__init__()
        self.levels = [level for level, k in enumerate(spec.vocab_sizes) if k is not None and k <= MOST_COUNTED]
        for level in self.levels:
            vocab_size = spec.vocab_sizes[level]
            self.register_buffer(f"total_{level}", torch.zeros(vocab_size, dtype=torch.int64))
            # A state is saved only between steps, where nothing is pending
            self.register_buffer(f"pending_{level}", torch.zeros(vocab_size, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, codes: Codes) -> None:
        for level in self.levels:
            pending = self.get_buffer(f"pending_{level}")
            code = codes[level].flatten()  # bincount would wait for the device
            pending.index_add_(0, code, torch.ones_like(code))

    @torch.no_grad()
    def merge(self) -> None:
        pending = [self.get_buffer(f"pending_{level}") for level in self.levels]
        if not pending:
            return
        merged = torch.cat(pending)
        if dist.is_initialized():
            dist.all_reduce(merged)
        for level, counted, part in zip(self.levels, pending, merged.split([len(p) for p in pending])):
            self.get_buffer(f"total_{level}").add_(part)
            counted.zero_()

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def summary(self) -> dict[str, float]:
        """Usage and perplexity, by level where there are several."""
        result = {}
        for level in self.levels:
            suffix = f"_{level}" if len(self.levels) > 1 else ""
            counts = self.get_buffer(f"total_{level}")
            result[f"codebook_usage{suffix}"] = codebook_usage(counts)
            result[f"perplexity{suffix}"] = perplexity(counts)
        return result

    def complaints(self) -> dict[str, str]:
        """For each level whose codebook has collapsed, what is seen of it and what helps."""
        result = {}
        for level in self.levels:
            counts = self.get_buffer(f"total_{level}")
            if has_collapsed(counts):
                result[f"codebook of level {level}"] = (
                    f"the codebook of level {level} has collapsed: {codebook_usage(counts):.1%} of its {len(counts)} "
                    f"codes are used, perplexity {perplexity(counts):.1f}. Lower training.learning_rate, take the "
                    "quantizer's init 'kmeans', raise revive_below of 'ema_vq', or take a smaller codebook"
                )
        return result

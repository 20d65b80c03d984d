"""What a quantizer is: feature map in, code map and code vectors out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prior.base import Codes


class Quantized(NamedTuple):
    """Result of quantizing a feature map.

    z: (B, out_channels, h, w) code vectors, with the gradient passed on to the input; codes: one int64 (B, h, w) per
    entry of `vocab_sizes`; losses: scalars, already weighted.
    """

    z: Tensor
    codes: Codes
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Maps each position of a feature map to one code, or to one code per entry of `vocab_sizes` (residual, factored).

    The tokenizer puts 1x1 convolutions around it, so `in_channels` and `out_channels` are whatever the method wants.
    Law: `embed(q(h).codes)` equals `q(h).z` bit for bit when evaluating in float32.
    """

    in_channels: int
    out_channels: int
    vocab_sizes: tuple[int, ...]
    is_stochastic: bool = False  # whether codes are drawn from a distribution q(codes | h)
    has_fixed_scale: bool = False  # whether h must begin at unit scale, since the code vectors cannot come to meet it
    settling_steps: int = 0  # training steps in which unused entries are expected: warnings of collapse wait for them

    @abstractmethod
    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        """Quantizes h, (B, in_channels, h, w); `step` drives annealing schedules, None means fully annealed."""

    @abstractmethod
    def embed(self, codes: Codes) -> Tensor:
        """The code vectors, (B, out_channels, h, w)."""

    def encode(self, h: Tensor, sample: bool = False) -> Codes:
        """The mode of q(codes | h), or a draw from it; for a deterministic quantizer the same thing."""
        return self(h).codes

    def draw(self, h: Tensor) -> tuple[Codes, Tensor]:
        """Codes drawn from q(codes | h), and log q of them in nats, (B,); 0 for a deterministic quantizer."""
        return self.encode(h), torch.zeros(len(h), device=h.device)

    def check_features(self, h: Tensor) -> None:
        """For a subclass to call before it looks at h, or keeps anything of it.

        Raises:
            ValueError: h is not (B, in_channels, h, w) with h and w at least 1, and B when training; not finite, when
                evaluating.
        """
        if h.dim() != 4 or h.shape[1] != self.in_channels or 0 in h.shape[2:]:
            raise ValueError(
                f"{type(self).__name__} takes features of shape (B, {self.in_channels}, h, w) with h and w at least 1, "
                f"got {tuple(h.shape)}"
            )
        if not self.training:
            check_finite(h)
        elif len(h) == 0:
            raise ValueError(f"{type(self).__name__} cannot train on a batch of no images, got {tuple(h.shape)}")

    def after_step(self) -> None:
        """To be called once after each optimizer step, on every process: codebooks of running averages move here."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, entries: Tensor) -> Tensor:
        return entries

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(vectors: Tensor, entries: Tensor) -> Tensor:
    """`entries` exactly, whose gradient goes to `vectors` (Bengio et al. 2013, arXiv:1308.3432).

    The usual `vectors + (entries - vectors).detach()` is off by a rounding error: then what the decoder sees while
    training is not what the codes decode to.
    """
    return _StraightThrough.apply(vectors, entries.detach())


def check_finite(h: Tensor) -> None:
    """Raises ValueError for infinity or not-a-number, of which a search would silently make some code."""
    # Its smallest and largest value show it, not-a-number too, in one pass: on the CPU isfinite takes twenty times that
    if h.numel() > 0 and not torch.stack(torch.aminmax(h)).isfinite().all():
        raise ValueError(
            "the encoder's output is not finite, so it has no codes; "
            "check the images and the weights (a diverged training?)"
        )

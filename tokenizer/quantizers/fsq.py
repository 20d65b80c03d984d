"""Quantization by rounding each channel to a few values."""

import math

import torch
from einops import rearrange
from torch import Tensor

from prior.base import Codes
from tokenizer.quantizers.base import Quantized, Quantizer, straight_through

LARGEST_CODE = 2**63 - 1
EPSILON = 1e-3  # by how much the bound exceeds the outermost grid points, so that these can be reached


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505).

    Each of len(levels) channels is bounded by a tanh and rounded to one of L values; the code is the mixed-radix number
    of these digits, the first channel's the least significant. There is no codebook to train or to collapse, so there
    are no losses. The code vectors lie in [-1, 1].

    Args:
        levels: number of values L of each channel; K is their product. (8, 5, 5, 5) is the paper's for K near 2^10; it
            advises at least 5 values per channel.
    Raises:
        ValueError: a level below 3 (two values are what LFQ is for), or more codes than int64 holds; features of
            another shape, or not finite when evaluating.
    """

    # features far smaller than a step of the grid would all be rounded to one code, and what has one code stays there
    has_fixed_scale = True

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__()
        levels = tuple(levels)  # JSON and YAML give lists
        if not levels or any(not isinstance(level, int) or level < 3 for level in levels):
            raise ValueError(f"levels must be integers of at least 3, e.g. (8, 5, 5, 5), got {levels}")
        if math.prod(levels) > LARGEST_CODE:
            raise ValueError(f"levels may have a product of 2^63 - 1 at most, to fit into int64, got {levels}")
        self.in_channels = self.out_channels = len(levels)
        self.vocab_sizes = (math.prod(levels),)
        # integers, which no change of the model's dtype can touch
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        place_values = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # bounds and rounding in float32
            self.check_features(h)
            vectors = rearrange(h.float(), "b d h w -> b h w d")
            bounded = self._bound(vectors)
            # not-a-number has no digit; what its gradient meets in the loop is the loop's to report
            digits = (bounded.round().long() + self.levels // 2).clamp(min=0).minimum(self.levels - 1)
            entries = straight_through(bounded / (self.levels // 2), self._entries(digits))
            codes = (digits * self.place_values).sum(dim=-1)
            return Quantized(rearrange(entries, "b h w d -> b d h w").to(h.dtype), (codes,), {})

    def embed(self, codes: Codes) -> Tensor:
        (codes,) = codes
        digits = codes[..., None] // self.place_values % self.levels
        return rearrange(self._entries(digits), "b h w d -> b d h w")

    def _bound(self, vectors: Tensor) -> Tensor:
        """f of section 3.1: between the outermost of L integers about zero, those of an even L half a step lower.

        The shift keeps f(0) = 0 nonetheless. The paper's listing has tan where this has the inverse of tanh, and ends
        just inside the outermost integers instead of just outside; few roundings ever tell them apart.
        """
        half_width = (self.levels - 1) * (1 + EPSILON) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half_width).atanh()
        return half_width * (vectors + shift).tanh() - offset

    def _entries(self, digits: Tensor) -> Tensor:
        half = self.levels // 2
        return (digits - half).float() / half

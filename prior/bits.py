"""Codes as bits, and what priors over bits have in common: two sides of units and an energy."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prior.annealed_importance import LogPartition
from prior.base import Codes, CodeSpec, Prior, PriorConfig, silent


@dataclass(frozen=True, kw_only=True)
class BitPriorConfig(PriorConfig):
    """What the configuration of every prior over bits holds.

    Args:
        num_left: units of the left side, the first bits; null (None in Python) takes half of them, rounded up. The rest
            are right.
    Raises:
        ValueError: classes, a vocabulary that is not a power of two, fewer than two bits, or an empty side.
    """

    num_left: int | None = None

    def __post_init__(self):
        super().__post_init__()
        bits = sum(bits_per_level(self.spec))
        if self.num_classes:
            raise ValueError(
                f"a prior over bits is unconditional: num_classes must be 0, got {self.num_classes}; "
                "gpt, pixelcnn and pixelsnail take classes"
            )
        if bits < 2:
            raise ValueError(f"a prior over bits needs at least 2 of them, one of each side, got {bits} in {self.spec}")
        if self.num_left is not None and not 1 <= self.num_left < bits:
            raise ValueError(f"num_left must lie in [1, {bits}), so that both sides have a unit, got {self.num_left}")


class BitPrior(Prior):
    """A distribution over the bits of codes with an energy E(z) of states and log Z: p(z) = exp(-E(z)) / Z.

    A vocabulary of 2^k is k bits (see `codes_to_bits`). The first num_left bits are the left units, the rest the right
    ones; a tokenizer whose posterior infers the left ones first can take the energy of means in place of states.
    """

    def __init__(self, config: BitPriorConfig):
        super().__init__(config)
        self.num_bits = sum(bits_per_level(config.spec))
        self.num_left = config.num_left or -(-self.num_bits // 2)
        self.num_right = self.num_bits - self.num_left

    @abstractmethod
    def energy(self, left: Tensor, right: Tensor) -> Tensor:
        """E in nats (B,) of states, or of their means, (B, num_left) and (B, num_right)."""

    @abstractmethod
    def log_partition_loss(self) -> Tensor:
        """A scalar whose gradient is, or estimates, that of log Z; to be called once per training step."""

    @abstractmethod
    def log_partition(self, callback: Callable[[int, int], None] = silent) -> LogPartition:
        """log Z in nats, of the present parameters, with its error; calls callback(done, total) if that takes long."""

    @property
    def energy_dtype(self) -> torch.dtype:
        """What energies are computed in: at least float32, also where the parameters are kept in less."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def sides(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Left (B, num_left) and right (B, num_right) units of codes, as floats."""
        return codes_to_bits(self.spec, codes).to(self.energy_dtype).split([self.num_left, self.num_right], dim=1)


def bits_per_code(spec: CodeSpec) -> tuple[int, ...]:
    """log2 of each level's vocabulary size.

    Raises:
        ValueError: a vocabulary is not a power of two.
    """
    widths = tuple(size.bit_length() - 1 for size in spec.vocab_sizes)
    if any(2**width != size for width, size in zip(widths, spec.vocab_sizes)):
        raise ValueError(
            f"a prior over bits needs vocabularies that are powers of two, got {spec}; "
            "gpt, pixelcnn and pixelsnail take these codes"
        )
    return widths


def bits_per_level(spec: CodeSpec) -> tuple[int, ...]:
    """Bits per image of each level; raises as `bits_per_code` does."""
    return tuple(length * width for length, width in zip(spec.lengths, bits_per_code(spec)))


def codes_to_bits(spec: CodeSpec, codes: Codes) -> Tensor:
    """(B, n) int64 zeros and ones: levels coarse to fine, codes in raster order, least significant bit first.

    A binary level is its own bits; a code of lookup-free quantization is the signs of its channels, in their order.
    """
    parts = []
    for code, width in zip(codes, bits_per_code(spec)):
        places = torch.arange(width, device=code.device)
        parts.append((code.flatten(1)[..., None] >> places & 1).flatten(1))
    return torch.cat(parts, dim=1)


def bits_to_codes(spec: CodeSpec, bits: Tensor) -> Codes:
    """The inverse of `codes_to_bits`, of bits of any type."""
    codes, parts = [], bits.long().split(bits_per_level(spec), dim=1)
    for part, length, width, shape in zip(parts, spec.lengths, bits_per_code(spec), spec.shapes):
        places = torch.arange(width, device=part.device)
        codes.append((part.unflatten(1, (length, width)) << places).sum(-1).unflatten(1, shape))
    return tuple(codes)


def mask_to_bits(spec: CodeSpec, known: Codes) -> Tensor:
    """(B, n) boolean: a mask over codes as one over their bits."""
    widths = bits_per_code(spec)
    return torch.cat([mask.flatten(1).repeat_interleave(width, 1) for mask, width in zip(known, widths)], dim=1)

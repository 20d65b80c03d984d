"""Independent bits with learned probabilities: the factorial prior of DVAE++'s first table."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.annealed_importance import LogPartition
from prior.base import Codes, Sampled, silent
from prior.bits import (
    BitPrior,
    BitPriorConfig,
    bits_per_code,
    bits_per_level,
    bits_to_codes,
    codes_to_bits,
    mask_to_bits,
)
from prior.float64 import in_float64
from prior.sampling import NOT_NUMBERS


class Bernoulli(BitPrior):
    """Independent bits (Vahdat et al. 2018, arXiv:1802.04920): E(z) = -b1 z_L - b2 z_R, log Z = sum of softplus(b).

    It is an `RBM` without couplings, with the same interface, so that a tokenizer may hold either; all of it is exact.

    Attributes:
        left_bias (num_left,), right_bias (num_right,): b1, b2, the log-odds of the bits; 0 at first.
    Args:
        config: code space and sides.
    """

    Config = BitPriorConfig
    sampling_options = frozenset({"temperature", "given", "return_log_prob"})

    def __init__(self, config: BitPriorConfig):
        super().__init__(config)
        self.left_bias = nn.Parameter(torch.zeros(self.num_left))
        self.right_bias = nn.Parameter(torch.zeros(self.num_right))

    @property
    def logits(self) -> Tensor:
        """(n,) log-odds of all bits, in the precision of energies."""
        return torch.cat([self.left_bias, self.right_bias]).to(self.energy_dtype)

    def energy(self, left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, enabled=False):
            return -(torch.cat([left, right], dim=1).to(self.energy_dtype) @ self.logits)

    def log_partition_loss(self) -> Tensor:
        """log Z itself, in nats."""
        return F.softplus(self.logits).sum()

    @torch.no_grad()
    def log_partition(self, callback: Callable[[int, int], None] = silent) -> LogPartition:
        value = F.softplus(in_float64(self.logits)).sum().item()
        return LogPartition(value, value, 0.0, math.inf, exact=True)

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """log p(codes) in nats (B,), differentiable."""
        self.check_inputs(codes, labels)
        return -self.energy(*self.sides(codes)) - self.log_partition_loss()

    def log_prob_by_code(self, codes: Codes, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        self.check_inputs(codes, labels)
        log_probs = _log_prob_of(codes_to_bits(self.spec, codes).bool(), self.logits)
        levels = zip(log_probs.split(bits_per_level(self.spec), dim=1), codes, bits_per_code(self.spec))
        return tuple(part.reshape(*code.shape, width).sum(dim=-1) for part, code, width in levels)

    def _sample(self, *arguments) -> Codes:
        return self._sample_by_steps(*arguments, None).codes

    def _sample_by_steps(self, num_samples, labels, options, noise, given, callback, codes_callback) -> Sampled:
        uniform, logits = noise.uniform(self.num_bits), self.logits
        if logits.isnan().any():
            raise ValueError(NOT_NUMBERS)
        if options.temperature > torch.finfo(torch.float32).tiny:  # at which 0 / temperature is still a number
            logits = logits / options.temperature
            bits = uniform < logits.sigmoid()
            log_probs = _log_prob_of(bits, logits)
        else:  # nothing is left to chance
            bits = (logits > 0).expand_as(uniform)
            log_probs = torch.zeros_like(uniform)
        if given is not None:
            fixed, known = codes_to_bits(self.spec, given[0]).bool(), mask_to_bits(self.spec, given[1])
            bits, log_probs = torch.where(known, fixed, bits), log_probs.masked_fill(known, 0.0)
        callback(self.num_bits, self.num_bits)
        return Sampled(bits_to_codes(self.spec, bits), log_probs.sum(dim=1))


def _log_prob_of(bits: Tensor, logits: Tensor) -> Tensor:
    """(B, n) nats: log-probabilities of bits (B, n), true or false, by their log-odds (n,)."""
    return -F.softplus(torch.where(bits, -logits, logits))

"""Markov chains for restricted Boltzmann machines: block-Gibbs sweeps whose random numbers cost little.

Letters: R chains, n1 and n2 units of the left and right side, T temperatures. A state is two float tensors of zeros
and ones, left (R, n1) and right (R, n2), because matrix products want floats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prior.float64 import in_float64


class Boltzmann(NamedTuple):
    """The parameters of p(left, right) = exp(left b1 + right b2 + left W right) / Z.

    weight: W (n1, n2); left_bias: b1 (n1,); right_bias: b2 (n2,).
    """

    weight: Tensor
    left_bias: Tensor
    right_bias: Tensor

    def energy(self, left: Tensor, right: Tensor) -> Tensor:
        """(R,) energies in nats of states (R, n1) and (R, n2), or of their means."""
        return -(left @ self.left_bias + right @ self.right_bias + ((left @ self.weight) * right).sum(-1))

    def scaled(self, inverse_temperature: float) -> "Boltzmann":
        """The distribution whose energies are multiplied by `inverse_temperature`."""
        return Boltzmann(*(inverse_temperature * parameter for parameter in self))

    def transposed(self) -> "Boltzmann":
        """The same distribution with its sides exchanged."""
        return Boltzmann(self.weight.T, self.right_bias, self.left_bias)


class BitDrawer:
    """Draws Bernoulli bits from logits in place, with 16 random bits each.

    A uniform number is (k + r) / 2^16 with k a 16-bit integer of each unit and r uniform in [0, 1) of each row. Every
    bit then has its probability exactly (to float32 rounding); what the units of a row share is only the part below
    2^-16, which decides for both of two units once in 2^32 draws. `torch.bernoulli` takes nine times as long, and
    float32 uniforms twice.

    Args:
        num_rows: R.
        num_columns: the largest number of units that will be drawn at once.
        like: gives the device and floating type of the logits.
        generator: None is torch's global one.
    """

    def __init__(self, num_rows: int, num_columns: int, like: Tensor, generator: torch.Generator | None = None):
        # random_ fills 64 bits in the time of 32, and all 64 of them are random
        self.words = torch.empty(-(-num_rows * num_columns // 4), dtype=torch.int64, device=like.device)
        self.rest = torch.empty(num_rows, 1, dtype=like.dtype, device=like.device)
        self.generator = generator

    def draw_(self, logits: Tensor, out: Tensor) -> Tensor:
        """Fills `out` (R, n) with bits of probability sigmoid(logits); overwrites `logits`."""
        num_words = -(-logits.numel() // 4)
        words = self.words[:num_words].random_(-(2**63), None, generator=self.generator)
        uniform = words.view(torch.int16)[: logits.numel()].view_as(logits)  # -2^15 <= k < 2^15
        self.rest.uniform_(2**15, 2**15 + 1, generator=self.generator).neg_()
        threshold = torch.add(self.rest, logits.sigmoid_(), alpha=2**16, out=logits)
        return out.copy_(uniform).lt_(threshold)  # of one type: mixed ones are compared one by one


class BlockGibbs:
    """Chains that draw all right units given the left ones, then all left ones given the right.

    Args:
        left, right: the states to start from (R, n1), (R, n2), as floats; they are changed in place.
        inverse_temperatures: (R, 1), by which each chain's energies are multiplied; None for 1.
        generator: None is torch's global one.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        *,
        inverse_temperatures: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        self.left, self.right = left, right
        self.inverse_temperatures = inverse_temperatures
        self.left_logits, self.right_logits = torch.empty_like(left), torch.empty_like(right)
        self.bits = BitDrawer(len(left), max(left.shape[1], right.shape[1]), left, generator)

    def sweep(self, parameters: Boltzmann, num_sweeps: int = 1) -> None:
        """Draws right given left, then left given right, `num_sweeps` times."""
        weight, left_bias, right_bias = parameters
        for _ in range(num_sweeps):
            self._draw(right_bias, self.left, weight, self.right_logits, out=self.right)
            self._draw(left_bias, self.right, weight.T, self.left_logits, out=self.left)

    def _draw(self, bias: Tensor, other: Tensor, weight: Tensor, logits: Tensor, out: Tensor) -> None:
        torch.addmm(bias, other, weight, out=logits)
        if self.inverse_temperatures is not None:
            logits.mul_(self.inverse_temperatures)
        self.bits.draw_(logits, out=out)


def reweight_population(
    left: Tensor, right: Tensor, old: Boltzmann, new: Boltzmann, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a step of population annealing (Hukushima & Iba 2003), from `old` parameters to `new` ones.

    Chains that the new parameters favour are repeated and others dropped, by systematic resampling with the weights
    exp(E_old - E_new); sweeps under the new parameters are to follow.

    Returns:
        left (R, n1) and right (R, n2) after resampling, and an estimate of log Z_new - log Z_old in nats. Sums of such
        estimates over many steps drift low: they are no log Z to report.
    """
    log_weights = in_float64(old.energy(left, right) - new.energy(left, right))
    # one offset for all: chain r is kept floor or ceil of its expected number of times
    dtype = torch.float64 if log_weights.device == left.device else torch.float32
    offset = in_float64(torch.rand((), dtype=dtype, device=left.device, generator=generator))
    cumulative = log_weights.softmax(0).cumsum(0)
    places = (torch.arange(len(left), device=offset.device) + offset) / len(left) * cumulative[-1]
    chosen = torch.searchsorted(cumulative, places, right=True).clamp(max=len(left) - 1).to(left.device)
    return left[chosen], right[chosen], log_weights.logsumexp(0) - math.log(len(left))


def exchange_temperatures(
    left: Tensor,
    right: Tensor,
    parameters: Boltzmann,
    inverse_temperatures: Tensor,
    *,
    first: int,
    generator: torch.Generator | None = None,
) -> None:
    """Parallel tempering's exchange of states between neighbouring temperatures, in place (Swendsen & Wang 1986).

    Neighbours i and i + 1 are exchanged with probability min(1, exp((t_i - t_{i+1}) (E_i - E_{i+1}))), which leaves
    the product of all the tempered distributions as it is.

    Args:
        left, right: states (T, R, n1), (T, R, n2) of T inverse temperatures.
        parameters: of inverse temperature 1.
        inverse_temperatures: t (T,).
        first: 0 for the pairs (0, 1), (2, 3), ...; 1 for (1, 2), (3, 4), ...; to be alternated.
        generator: None is torch's global one.
    """
    lower = torch.arange(first, len(left) - 1, 2, device=left.device)
    energy = parameters.energy(left, right)  # (T, R)
    log_ratio = (inverse_temperatures[lower] - inverse_temperatures[lower + 1])[:, None] * (
        energy[lower] - energy[lower + 1]
    )
    uniform = torch.rand(log_ratio.shape, dtype=log_ratio.dtype, device=left.device, generator=generator)
    exchanged = (uniform.log() < log_ratio)[..., None]
    for side in (left, right):
        below, above = side[lower], side[lower + 1]
        side[lower], side[lower + 1] = torch.where(exchanged, above, below), torch.where(exchanged, below, above)

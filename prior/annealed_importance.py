"""log Z of a restricted Boltzmann machine: summed where a side is small, else bracketed by annealing from both ends.

Letters: R chains, n1 and n2 units of the left and right side, T temperatures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.base import silent
from prior.boltzmann_samplers import BitDrawer, Boltzmann
from prior.float64 import float64_device, in_float64

# Sums over the states of a side are taken up to 2^16 of them
LARGEST_SUM = 16
# Estimates of log Z from both ends must come so close before a likelihood is reported
LARGEST_GAP = 0.1


@dataclass(frozen=True)
class LogPartition:
    """log Z in nats with what is known of its error.

    lower: annealed importance sampling from a base whose log Z is known; errs low on average.
    upper: the same backwards from samples of the model, which errs high on average where these are fair samples. Both
        are blind to a mode that no chain has visited.
    standard_error: of `lower`, from the spread of its importance weights w; 0 where exact.
    effective_sample_size: (sum w)^2 / sum w^2; infinite where exact.
    exact: whether it is a sum over all states, with lower = upper.
    """

    lower: float
    upper: float
    standard_error: float
    effective_sample_size: float
    exact: bool

    @property
    def value(self) -> float:
        """`lower`; where the two disagree the larger, because a likelihood looks better by what log Z falls short."""
        return self.lower if self.agree else max(self.lower, self.upper)

    @property
    def gap(self) -> float:
        """Distance of the two estimates in nats."""
        return abs(self.upper - self.lower)

    @property
    def agree(self) -> bool:
        """Whether the two estimates lie within 0.1 nat of each other."""
        return self.gap <= LARGEST_GAP

    def require(self) -> "LogPartition":
        """Itself, if it can be trusted.

        Raises:
            ValueError: the two estimates disagree.
        """
        if not self.agree:
            raise ValueError(
                f"log Z is not known well enough for a likelihood: annealing gives {self.lower:.3f} nats from the base "
                f"and {self.upper:.3f} from the chains, {self.gap:.3f} apart and not within {LARGEST_GAP}; "
                "raise ais_temperatures and ais_chains, or burn_in if the chains mix slowly "
                "(pipeline.prior.ais_temperatures = 10_000, or evaluate.py --ais_temperatures 10000)"
            )
        return self


def exact_log_partition(parameters: Boltzmann) -> LogPartition:
    """log Z as a sum over the states of the smaller side, the larger one summed analytically, in float64.

    Raises:
        ValueError: both sides have more than 16 units.
    """
    parameters = Boltzmann(*(in_float64(p.detach()) for p in parameters))
    num_units = min(parameters.weight.shape)
    if num_units > LARGEST_SUM:
        raise ValueError(
            f"log Z is summed over the states of at most {LARGEST_SUM} units, "
            f"got sides of {' and '.join(map(str, parameters.weight.shape))}"
        )
    if len(parameters.left_bias) > num_units:
        parameters = parameters.transposed()
    device = parameters.weight.device
    places = torch.arange(num_units, device=device)
    sums = []
    for numbers in torch.arange(2**num_units, device=device).split(2**12):
        states = (numbers[:, None] >> places & 1).double()
        sums.append(negative_free_energy(parameters, states).logsumexp(0))
    value = torch.stack(sums).logsumexp(0).item()
    return LogPartition(value, value, 0.0, math.inf, exact=True)


def negative_free_energy(parameters: Boltzmann, left: Tensor) -> Tensor:
    """(R,) log of the sum over all right states of exp(-energy), for left states (R, n1)."""
    return left @ parameters.left_bias + F.softplus(left @ parameters.weight + parameters.right_bias).sum(-1)


def estimated_log_partition(
    parameters: Boltzmann,
    left: Tensor,
    right: Tensor,
    *,
    num_temperatures: int,
    generator: torch.Generator,
    callback: Callable[[int, int], None] = silent,
) -> LogPartition:
    """log Z by annealed importance sampling (Neal 2001; Salakhutdinov & Murray 2008), forwards and backwards.

    The base is the factorial distribution with the means of the given samples; the larger side is summed out. The
    backward estimate (Burda, Grosse & Salakhutdinov 2015) starts from the samples themselves.

    Args:
        parameters: of the model.
        left, right: samples of the model (R, n1), (R, n2); as many chains are annealed in each direction.
        num_temperatures: evenly spaced inverse temperatures from 0 (the base) to 1 (the model).
        generator: on the parameters' device.
        callback: called as callback(done, total) after each temperature.
    """
    if len(parameters.left_bias) > len(parameters.right_bias):
        parameters, left, right = parameters.transposed(), right, left
    base_left, base_right = _log_odds(left), _log_odds(right)
    base_log_partition = sum(F.softplus(in_float64(base)).sum().item() for base in (base_left, base_right))
    times = torch.linspace(0, 1, num_temperatures, dtype=torch.float64).tolist()

    start = torch.empty_like(left)
    BitDrawer(*left.shape, left, generator).draw_(base_left.expand_as(left).clone(), out=start)
    ends, each = (parameters, base_left, base_right), num_temperatures - 1
    forward = annealed_log_weights(*ends, start, times, generator, lambda done: callback(done, 2 * each))
    backward = annealed_log_weights(*ends, left, times[::-1], generator, lambda done: callback(each + done, 2 * each))

    lower = base_log_partition + log_mean_exp(forward)
    upper = base_log_partition - log_mean_exp(backward)
    weights = forward.softmax(0)
    effective = 1 / weights.square().sum().item()
    standard_error = (weights.std() * math.sqrt(len(weights))).item()  # sd(w) / (mean(w) sqrt(R)), as sum w = 1
    return LogPartition(lower, upper, standard_error, effective, exact=False)


def annealed_log_weights(
    parameters: Boltzmann,
    base_left: Tensor,
    base_right: Tensor,
    left: Tensor,
    times: list[float],
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """(R,) float64 log importance weights of chains that move along p_t(z) ~ base(z)^(1-t) model(z)^t.

    Args:
        parameters: of the model, t = 1.
        base_left, base_right: biases (n1,), (n2,) of the base, t = 0.
        left: states (R, n1) drawn from p_t at the first of `times`; they are not changed.
        times: t, from 0 up to 1 or from 1 down to 0.
        generator: None is torch's global one.
        advance: called with the number of steps done, after each.
    """
    weight, left_bias, right_bias = parameters
    left, right = left.clone(), left.new_empty(len(left), len(right_bias))
    field, right_logits, left_logits = torch.empty_like(right), torch.empty_like(right), torch.empty_like(left)
    bits = BitDrawer(len(left), max(weight.shape), left, generator)
    log_weights = torch.zeros(len(left), dtype=torch.float64, device=float64_device(left.device))
    for done, (before, after) in enumerate(pairwise(times), start=1):
        # log p_after(left) - log p_before(left), with the right side summed out, before the chains move: their order
        # matters, for the weights to be unbiased
        torch.addmm(right_bias - base_right, left, weight, out=field)
        softplus_before = F.softplus(torch.add(base_right, field, alpha=before, out=right_logits))
        softplus_after = F.softplus(torch.add(base_right, field, alpha=after, out=right_logits))
        # subtracted unit by unit: sums of softplus are large, and float32
        log_weights += softplus_after.sub_(softplus_before).sum(1).to(log_weights.device)
        log_weights += ((after - before) * (left @ (left_bias - base_left))).to(log_weights.device)
        # a block-Gibbs sweep, under which p_after stays as it is
        bits.draw_(right_logits, out=right)
        torch.addmm(torch.lerp(base_left, left_bias, after), right, weight.T, alpha=after, out=left_logits)
        bits.draw_(left_logits, out=left)
        advance(done)
    return log_weights


def log_mean_exp(values: Tensor) -> float:
    return values.logsumexp(0).item() - math.log(len(values))


def _log_odds(samples: Tensor) -> Tensor:
    """Logits (n,) of the units' means, with one more zero and one more one each, so that they are finite."""
    ones = samples.sum(0) + 1
    return ones.log() - (len(samples) + 2 - ones).log()

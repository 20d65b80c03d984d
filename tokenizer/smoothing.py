"""r(zeta | z): continuous variables that stand in for bits, so that gradients reach the encoder.

Each family is overlapping: every zeta is possible for both values of the bit, and r(zeta | 1) is the mirror of
r(zeta | 0). The mixture q(zeta) = q r(zeta | 1) + (1 - q) r(zeta | 0) with q = sigmoid(logit) is reparameterised: at a
fixed quantile rho of it, zeta is a differentiable function of the logit,

    dzeta / dlogit = q (1 - q) (F0 - F1) / (q r1 + (1 - q) r0)

with densities r and cumulative distributions F (Vahdat et al. 2018, arXiv:1805.07445, section 3), whether or not
the quantile has a closed form.

To add a family, write its class and name it in `SMOOTHINGS`.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Relaxed(NamedTuple):
    """Draws of zeta, and log_ratio = log r(zeta | 1) - log r(zeta | 0); both with a gradient to the logits."""

    zeta: Tensor
    log_ratio: Tensor


class Smoothing(nn.Module, ABC):
    """One family r(zeta | z) of sharpness beta.

    Args:
        beta: the larger, the closer zeta lies to the bit, and the larger the variance of the gradient.
    Raises:
        ValueError: beta is not positive.
    """

    def __init__(self, beta: float):
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta}")
        super().__init__()
        self.beta = beta

    @abstractmethod
    def relax(self, logits: Tensor) -> Relaxed:
        """Draws zeta ~ q(zeta), of the shape of the logits of q(z = 1), with torch's global generator."""


class Exponential(Smoothing):
    """r(zeta | 0) proportional to exp(-beta zeta) on [0, 1] (DVAE++, Vahdat et al. 2018, arXiv:1802.04920).

    The paper's overlapping transformation: the quantile of the mixture is the root of a quadratic equation. Its
    textbook root loses every digit of float32 for a confident encoder; the logarithmic form used here, one branch of
    which is the mirror image of the other, does not.
    """

    def __init__(self, beta: float = 10.0):
        super().__init__(beta)

    def relax(self, logits: Tensor) -> Relaxed:
        with torch.no_grad():
            zeta = self.quantile(torch.rand_like(logits), logits)
            slope = self.slope(zeta, logits)
        zeta = zeta + slope * (logits - logits.detach())
        return Relaxed(zeta, self.beta * (2 * zeta - 1))

    def quantile(self, rho: Tensor, logits: Tensor) -> Tensor:
        """zeta in [0, 1] at which the mixture's cumulative distribution is rho."""
        beta, decay = self.beta, math.exp(-self.beta)
        log_q, log_not_q = F.logsigmoid(logits), F.logsigmoid(-logits)
        q, not_q = log_q.exp(), log_not_q.exp()
        b = rho * (1 - decay) - not_q + q * decay
        log_root = torch.log((b.abs() + (b.square() + 4 * q * not_q * decay).sqrt()) / 2)
        return torch.where(b < 0, (log_not_q - log_root) / beta, 1 + (log_root - log_q) / beta).clamp(0, 1)

    def slope(self, zeta: Tensor, logits: Tensor) -> Tensor:
        """dzeta / dlogit at a fixed quantile."""
        beta = self.beta
        spread = torch.expm1(-beta * zeta) * torch.expm1(-beta * (1 - zeta))
        density = torch.logaddexp(F.logsigmoid(logits) - beta * (1 - zeta), F.logsigmoid(-logits) - beta * zeta)
        return spread * torch.exp(F.logsigmoid(logits) + F.logsigmoid(-logits) - density) / beta


class UniformExponential(Smoothing):
    """The exponential family with a share epsilon of uniform noise, which bounds the log ratio (DVAE#).

    Args:
        beta: of the exponential part.
        epsilon: share of the uniform part, in (0, 1).
    """

    def __init__(self, beta: float = 16.0, epsilon: float = 0.05):
        super().__init__(beta)
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie in (0, 1), got {epsilon}")
        self.epsilon = epsilon

    def relax(self, logits: Tensor) -> Relaxed:
        with torch.no_grad():
            u = torch.rand_like(logits)
            decayed = -torch.log1p(u * math.expm1(-self.beta)) / self.beta
            distance = torch.where(torch.rand_like(logits) < self.epsilon, u, decayed)
            zeta = torch.where(_bits(logits), 1 - distance, distance)
            overlap = self.cdf(zeta) + self.cdf(1 - zeta) - 1  # F1(zeta) = 1 - F0(1 - zeta)
            slope = slope_of_mixture(logits, self.density(zeta), self.density(1 - zeta), overlap)
        zeta = zeta + slope * (logits - logits.detach())
        return Relaxed(zeta, self.density(1 - zeta).log() - self.density(zeta).log())

    def density(self, zeta: Tensor) -> Tensor:
        """r(zeta | 0)."""
        scale = self.beta / -math.expm1(-self.beta)
        return (1 - self.epsilon) * scale * torch.exp(-self.beta * zeta) + self.epsilon

    def cdf(self, zeta: Tensor) -> Tensor:
        """F(zeta | 0)."""
        return (1 - self.epsilon) * torch.expm1(-self.beta * zeta) / math.expm1(-self.beta) + self.epsilon * zeta


class Power(Smoothing):
    """r(zeta | 0) = zeta^(1/beta - 1) / beta on [0, 1] (DVAE#, arXiv:1805.07445).

    Most zeta lie closer to 0 or 1 than float32 can tell from them on the side of 1. What is computed is hence the
    logit of zeta, from the distance to the nearer vertex, which underflows no logarithm.
    """

    def __init__(self, beta: float = 30.0):
        super().__init__(beta)

    def relax(self, logits: Tensor) -> Relaxed:
        beta = self.beta
        with torch.no_grad():
            bits = _bits(logits)
            u = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny ** (1 / 2))
            log_distance = beta * u.log()
            distance = log_distance.exp()
            log_rest = torch.log1p(-distance.clamp(max=1 - 2**-24))
            # (1 - distance)^(1/beta) is the cumulative distribution on the far side
            far = torch.exp(log_rest / beta)
            toward = torch.where(bits, logits, -logits)  # the logit of the bit that was drawn
            # Densities times zeta (1 - zeta): those of logit(zeta)
            near_density = u * log_rest.exp() / beta
            far_density = far * distance / beta
            spread = torch.exp(F.logsigmoid(logits) + F.logsigmoid(-logits)) * (u + far - 1)
            slope = spread / (toward.sigmoid() * near_density + (-toward).sigmoid() * far_density)
            logit_zeta = torch.where(bits, log_rest - log_distance, log_distance - log_rest)
        logit_zeta = logit_zeta + slope * (logits - logits.detach())
        return Relaxed(logit_zeta.sigmoid(), (1 - 1 / beta) * logit_zeta)


class Gaussian(Smoothing):
    """r(zeta | z) = N(zeta; z, 1 / beta) on the real line (DVAE#, arXiv:1805.07445)."""

    def __init__(self, beta: float = 25.0):
        super().__init__(beta)

    def relax(self, logits: Tensor) -> Relaxed:
        root = math.sqrt(self.beta)
        with torch.no_grad():
            zeta = _bits(logits).to(logits.dtype) + torch.randn_like(logits) / root
            r0 = torch.exp(-self.beta / 2 * zeta.square())
            r1 = torch.exp(-self.beta / 2 * (zeta - 1).square())
            overlap = torch.special.ndtr(zeta * root) - torch.special.ndtr((zeta - 1) * root)
            slope = slope_of_mixture(logits, r0, r1, overlap * math.sqrt(2 * math.pi) / root)
        zeta = zeta + slope * (logits - logits.detach())
        return Relaxed(zeta, self.beta * (zeta - 0.5))


SMOOTHINGS: dict[str, type[Smoothing]] = {
    "exponential": Exponential,
    "gaussian": Gaussian,
    "power": Power,
    "uniform_exponential": UniformExponential,
}


def _bits(logits: Tensor) -> Tensor:
    return torch.rand_like(logits) < logits.sigmoid()


def slope_of_mixture(logits: Tensor, r0: Tensor, r1: Tensor, overlap: Tensor) -> Tensor:
    """dzeta / dlogit at a fixed quantile; overlap is F0 - F1."""
    q, not_q = logits.sigmoid(), (-logits).sigmoid()
    return q * not_q * overlap / (q * r1 + not_q * r0).clamp(min=torch.finfo(logits.dtype).tiny)

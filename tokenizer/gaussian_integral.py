"""DVAE# with the Gaussian-integral relaxation, which follows the couplings of the Boltzmann machine."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.rbm import RBM
from tokenizer.binary_vae import BinaryVAE, BinaryVAEConfig, Posterior
from tokenizer.latent_networks import Decoded
from tokenizer.smoothing import slope_of_mixture


@dataclass(frozen=True, kw_only=True)
class GaussianIntegralConfig(BinaryVAEConfig):
    """Configuration of `GaussianIntegral`.

    Args:
        beta: least precision of zeta around z; it is raised where the couplings are stronger.
    """

    beta: float = 30.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if self.prior.get("type") != "rbm":
            raise ValueError(f"the Gaussian integral is that of a Boltzmann machine, got prior {self.prior}")


class GaussianIntegral(BinaryVAE):
    """DVAE# by the Gaussian integral trick (Vahdat et al. 2018, arXiv:1805.07445, section 4).

    r(zeta | z) = N(zeta; z, M^-1) with M = [[0, W], [W', 0]] + lambda I makes the marginal density of zeta under the
    machine exact: log p(zeta) = logdet(M / 2 pi) / 2 - zeta' M zeta / 2 + sum_i softplus(b_i + (M zeta)_i - lambda / 2)
    - log Z. lambda exceeds the largest singular value of W at every step. The posterior of each zeta is a mixture of
    two normal distributions one apart, with a shift inferred from the image and a learned width. With k > 1 draws the
    bound is importance-weighted.

    Args:
        config: see `GaussianIntegralConfig`.
    """

    Config = GaussianIntegralConfig
    outputs_per_latent = 2

    def __init__(self, config: GaussianIntegralConfig):
        super().__init__(config)
        self.width = nn.Parameter(torch.ones(config.num_groups, config.bits_per_group))

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        groups = iter(0.2 * self.width.abs() + 0.05)
        (logits, latents, log_q), features = self.training_pass(
            images, lambda p: relax_normal(*p.chunk(2, dim=1), next(groups))
        )
        decoded = self.decode_latents(latents, features)
        log_p = unnormalized_log_density(self.prior, latents, self.config.beta)
        local = self.local_cost(decoded, kl_weight, self.config.num_draws)
        log_weights = kl_weight * (log_p - log_q.sum(dim=1)) - self.distortion(decoded, images) - local
        return self.importance_losses(log_weights, kl_weight), Posterior(logits, latents, None), decoded

    def posterior_logits(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, dim=1)[0]


def relax_normal(logits: Tensor, shift: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, zeta, log q(zeta)), each (B, n), of (1 - q) N(delta, width^2) + q N(1 + delta, width^2).

    zeta has a gradient to logits, shift and width at its fixed quantile; delta = (sigmoid(shift) - 1/2) / 2.
    """
    delta = (shift.sigmoid() - 0.5) / 2
    with torch.no_grad():
        bits = (torch.rand_like(logits) < logits.sigmoid()).to(logits.dtype)
        zeta = bits + delta + width * torch.randn_like(logits)
        at_zero, at_one = (zeta - delta) / width, (zeta - 1 - delta) / width
        r0, r1 = torch.exp(-at_zero.square() / 2), torch.exp(-at_one.square() / 2)
        overlap = (torch.special.ndtr(at_zero) - torch.special.ndtr(at_one)) * math.sqrt(2 * math.pi) * width
        by_logit = slope_of_mixture(logits, r0, r1, overlap)
        at_zero_given_zeta = torch.sigmoid(-logits + (at_one.square() - at_zero.square()) / 2)
        by_width = at_zero_given_zeta * at_zero + (1 - at_zero_given_zeta) * at_one
    zeta = zeta + by_logit * (logits - logits.detach()) + (delta - delta.detach()) + by_width * (width - width.detach())
    at_zero, at_one = (zeta - delta) / width, (zeta - 1 - delta) / width
    log_q = torch.logaddexp(F.logsigmoid(-logits) - at_zero.square() / 2, F.logsigmoid(logits) - at_one.square() / 2)
    return logits, zeta, log_q - width.log() - math.log(2 * math.pi) / 2


def unnormalized_log_density(prior: RBM, zeta: Tensor, beta: float) -> Tensor:
    """log p(zeta) + log Z, (B,) nats, with precision lambda = max(beta, largest singular value of W + 5).

    In float32 or better also under autocast, as energies are: matrices cannot be factorised in less.
    """
    with torch.autocast(zeta.device.type, enabled=False):
        parts = (prior.weight, prior.left_bias, prior.right_bias, zeta)
        weight, left_bias, right_bias, zeta = (part.to(prior.energy_dtype) for part in parts)
        left, right = zeta.split([prior.num_left, prior.num_right], dim=1)
        gram = weight.T @ weight
        with torch.no_grad():
            largest = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()
            precision = (largest + 5).clamp(min=beta)
        # Schur's complement: logdet M = n log lambda + logdet(I - W'W / lambda^2)
        factor = torch.linalg.cholesky(torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - gram / precision**2)
        logdet = zeta.shape[1] * (precision.log() - math.log(2 * math.pi)) + 2 * factor.diagonal().log().sum()
        field = torch.cat([right @ weight.T, left @ weight], dim=1) + precision * zeta
        biases = torch.cat([left_bias, right_bias])
        return logdet / 2 + (F.softplus(biases + field - precision / 2) - zeta * field / 2).sum(dim=1)

"""DVAE#: relaxed latents with their own marginal density under a Boltzmann machine, trained by importance weighting."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.bernoulli import Bernoulli
from prior.bits import BitPrior
from tokenizer.binary_vae import Posterior
from tokenizer.dvaepp import DVAEPP
from tokenizer.latent_networks import Decoded

MEAN_FIELD_SWEEPS = 5


class DVAESharp(DVAEPP):
    """DVAE# with factorial relaxations (Vahdat et al. 2018, arXiv:1805.07445): the marginal bound.

    zeta alone is the latent variable: log p(zeta) = log sum_z p(z) r(zeta | z) is the log partition function of the
    Boltzmann machine with log r(zeta | 1) / r(zeta | 0) added to its biases, bounded from below by mean field; with a
    factorial prior it is exact. This bound is tighter than DVAE++'s of z and zeta together, and with k > 1 draws it is
    importance-weighted.

    Args:
        config: see `DVAEPPConfig`; the paper's families are power, uniform_exponential, exponential and gaussian.
    """

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        posterior, features = self.training_pass(images, lambda logits: (logits, *self.smoothing.relax(logits)))
        decoded = self.decode_latents(posterior.latents, features)
        # r(zeta | 0) is a factor of both densities
        log_q = torch.logaddexp(F.logsigmoid(posterior.logits) + posterior.log_ratio, F.logsigmoid(-posterior.logits))
        log_p = unnormalized_log_marginal(self.prior, posterior.log_ratio)
        local = self.local_cost(decoded, kl_weight, self.config.num_draws)
        log_weights = kl_weight * (log_p - log_q.sum(dim=1)) - self.distortion(decoded, images) - local
        return self.importance_losses(log_weights, kl_weight), posterior, decoded


def unnormalized_log_marginal(prior: BitPrior, log_ratio: Tensor) -> Tensor:
    """log sum_z exp(-energy(z) + log_ratio . z), (B,) nats: exact for `Bernoulli`, a lower bound for `RBM`.

    By mean field; its gradient takes the means as constant, where the bound is stationary in them. In float32 or better
    also under autocast, as energies are.
    """
    with torch.autocast(log_ratio.device.type, enabled=False):
        log_ratio = log_ratio.to(prior.energy_dtype)
        left = prior.left_bias + log_ratio[:, : prior.num_left]
        right = prior.right_bias + log_ratio[:, prior.num_left :]
        if isinstance(prior, Bernoulli):
            return F.softplus(left).sum(dim=1) + F.softplus(right).sum(dim=1)
        with torch.no_grad():
            weight, mean_left = prior.weight.to(left.dtype), torch.full_like(left, 0.5)
            for _ in range(MEAN_FIELD_SWEEPS):
                mean_right = torch.sigmoid(torch.addmm(right, mean_left, weight))
                mean_left = torch.sigmoid(torch.addmm(left, mean_right, weight.T))
            means = torch.cat([mean_left, mean_right], dim=1)
            entropy = -(torch.special.xlogy(means, means) + torch.special.xlog1py(1 - means, -means)).sum(dim=1)
        return -prior.energy(mean_left, mean_right) + (log_ratio * means).sum(dim=1) + entropy

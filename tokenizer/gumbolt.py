"""GumBolt: binary Concrete latents with a Boltzmann machine as prior."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.binary_vae import BinaryVAE, BinaryVAEConfig, Posterior
from tokenizer.latent_networks import Decoded


@dataclass(frozen=True, kw_only=True)
class GumBoltConfig(BinaryVAEConfig):
    """Configuration of tokenizers with binary Concrete latents.

    Args:
        temperature: of the relaxation; the lower, the closer to bits, and the larger the variance of the gradient.
    """

    temperature: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


class GumBolt(BinaryVAE):
    """GumBolt (Khoshaman & Amin 2018, arXiv:1805.07349).

    The relaxed latents stand in the energy in place of bits, over the partition function of the discrete machine; the
    objective is a proxy, and what is evaluated is the discrete model. With k > 1 draws it is importance-weighted.

    Args:
        config: see `GumBoltConfig`.
    """

    Config = GumBoltConfig

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        posterior, features = self.training_pass(images, lambda logits: relax_concrete(logits, self.config.temperature))
        decoded = self.decode_latents(posterior.latents, features)
        log_q = (posterior.latents * posterior.logits - F.softplus(posterior.logits)).sum(dim=1)
        log_p = -self.prior.energy(*self.halves(posterior.latents))
        local = self.local_cost(decoded, kl_weight, self.config.num_draws)
        log_weights = kl_weight * (log_p - log_q) - self.distortion(decoded, images) - local
        return self.importance_losses(log_weights, kl_weight), posterior, decoded


def relax_concrete(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, None]:
    """(logits, draws of the binary Concrete distribution in (0, 1), None) (Maddison et al. 2017, arXiv:1611.00712)."""
    u = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
    return logits, torch.sigmoid((logits + u.logit()) / temperature), None

"""The discrete VAE with binary Concrete (Gumbel-softmax) latents and a factorial prior."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.binary_vae import BinaryVAE, Posterior
from tokenizer.gumbolt import GumBoltConfig
from tokenizer.latent_networks import Decoded
from tokenizer.latent_vae import importance_weighted


@dataclass(frozen=True, kw_only=True)
class ConcreteConfig(GumBoltConfig):
    """Configuration of `Concrete`; the prior must be factorial."""

    prior: dict = field(default_factory=lambda: {"type": "bernoulli"})

    def __post_init__(self):
        super().__post_init__()
        if self.prior.get("type") != "bernoulli":
            raise ValueError(
                f"a Boltzmann prior has no Concrete density, got prior {self.prior}; take tokenizer 'gumbolt'"
            )


class Concrete(BinaryVAE):
    """Discrete VAE by the Concrete distribution (Maddison et al. 2017, arXiv:1611.00712; Jang et al. 2017).

    Posterior and prior are both relaxed at the same temperature, so that the bound is one of the relaxed model
    (Maddison et al., section 3.3 and appendix C.3). Densities are those of the logits of the latents, where the
    Jacobian cancels. With k > 1 draws it is importance-weighted.

    Args:
        config: see `ConcreteConfig`.
    """

    Config = ConcreteConfig

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        temperature = self.config.temperature

        def relax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            u = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
            scaled = logits + u.logit()  # temperature times the logit of zeta
            return logits, torch.sigmoid(scaled / temperature), scaled

        (logits, latents, scaled), features = self.training_pass(images, relax)
        decoded = self.decode_latents(latents, features)
        log_ratio = _log_logistic(scaled - self.prior.logits) - _log_logistic(scaled - logits)
        local = self.local_cost(decoded, kl_weight, self.config.num_draws)
        log_weights = kl_weight * log_ratio.sum(dim=1) - self.distortion(decoded, images) - local
        losses = {"bound": importance_weighted(log_weights, self.config.num_draws).mean()}
        return losses, Posterior(logits, latents, None), decoded


def _log_logistic(x: Tensor) -> Tensor:
    """Logarithm of the standard logistic density."""
    return F.logsigmoid(x) + F.logsigmoid(-x)

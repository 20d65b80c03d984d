"""DVAE++: binary latents relaxed by overlapping distributions, with a Boltzmann machine as prior."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenizer.binary_vae import BinaryVAE, BinaryVAEConfig, Posterior, entropy
from tokenizer.latent_networks import Decoded
from tokenizer.registry import build
from tokenizer.smoothing import SMOOTHINGS


@dataclass(frozen=True, kw_only=True)
class DVAEPPConfig(BinaryVAEConfig):
    """Configuration of `DVAEPP`.

    Args:
        smoothing: r(zeta | z), {"type": name, **options}.
    """

    smoothing: dict = field(default_factory=lambda: {"type": "exponential"})


class DVAEPP(BinaryVAE):
    """DVAE++ (Vahdat et al. 2018, arXiv:1802.04920).

    The KL term is that of z and zeta together, KL(q(z, zeta | x) || p(z, zeta)): r(zeta | z) cancels, and given zeta it
    is analytic. In the couplings, the bits of the left side stand with their mean given their own zeta,
    nu = q(z = 1 | zeta, x), since zeta of the left side is what the right side is inferred from; the mean given x alone
    would be biased. With k > 1 draws the loss is their mean.

    Args:
        config: see `DVAEPPConfig`.
    """

    Config = DVAEPPConfig
    parts: ClassVar = {**BinaryVAE.parts, "smoothing": SMOOTHINGS}

    def __init__(self, config: DVAEPPConfig):
        super().__init__(config)
        self.smoothing = build("smoothing", SMOOTHINGS, config.smoothing)

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        posterior, features = self.training_pass(images, lambda logits: (logits, *self.smoothing.relax(logits)))
        decoded = self.decode_latents(posterior.latents, features)
        entropies = entropy(posterior.logits)
        # Without log Z, whose value nobody knows while training and whose gradient is in log_partition_loss
        kl = self.cross_entropy(posterior) - entropies.sum(dim=1)
        losses = {
            "reconstruction": self.distortion(decoded, images).mean(),
            "kl_minus_log_partition": kl_weight * kl.mean(),
            "log_partition": kl_weight * self.prior.log_partition_loss(),
            **self.local_losses(decoded, kl_weight),
        }
        return losses, posterior, decoded

    def cross_entropy(self, posterior: Posterior) -> Tensor:
        """An unbiased draw of E_q[energy(z)], (B,) nats."""
        means = torch.sigmoid(posterior.logits)
        left, right = self.halves(means)
        if self.config.num_groups == 1:
            return self.prior.energy(left, right)
        left_given_zeta, _ = self.halves(torch.sigmoid(posterior.logits + posterior.log_ratio))
        # Biases take the mean given x, which has the same expectation and less variance
        biases = ((left_given_zeta - left) * self.prior.left_bias).sum(dim=1)
        return self.prior.energy(left_given_zeta, right) + biases

"""DVAE: bits with spike-and-exponential relaxations and Rolfe's gradient of the KL term."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prior.bernoulli import Bernoulli
from tokenizer.binary_vae import BinaryVAE, BinaryVAEConfig, Posterior, entropy
from tokenizer.latent_networks import Decoded


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(BinaryVAEConfig):
    """Configuration of `DVAE`.

    Args:
        beta: sharpness of the exponential, at most 80: e^beta is a number of float32.
    """

    beta: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta <= 80:
            raise ValueError(f"beta must be above 0 and at most 80, got {self.beta}")


class DVAE(BinaryVAE):
    """DVAE (Rolfe 2017, arXiv:1609.02200): zeta = 0 where z = 0, and an exponential towards 1 where z = 1.

    zeta > 0 tells the bit, so the KL term is one of bits whose gradient is written by hand (appendix F of the paper);
    its value means nothing and is reported as 0. With one group, or a factorial prior, the KL term is analytic.

    Args:
        config: see `DVAEConfig`.
    """

    Config = DVAEConfig

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        posterior, features = self.training_pass(images, lambda logits: (logits, self.relax(logits), None))
        decoded = self.decode_latents(posterior.latents, features)
        if self.config.num_groups == 1 or isinstance(self.prior, Bernoulli):
            means = self.halves(posterior.logits.sigmoid())
            kl = (self.prior.energy(*means) - entropy(posterior.logits).sum(dim=1)).mean()
        else:
            kl = self.kl_surrogate(posterior)
        losses = {
            "reconstruction": self.distortion(decoded, images).mean(),
            "kl_minus_log_partition": kl_weight * kl,
            "log_partition": kl_weight * self.prior.log_partition_loss(),
            **self.local_losses(decoded, kl_weight),
        }
        return losses, posterior, decoded

    def relax(self, logits: Tensor) -> Tensor:
        """zeta by the inverse of its cumulative distribution, which is flat up to 1 - q."""
        q = logits.sigmoid().clamp(min=1e-7)
        above = (torch.rand_like(logits) - (-logits).sigmoid()) / q
        inside = above > 0
        zeta = torch.log1p(above.where(inside, 0.0) * math.expm1(self.config.beta)) / self.config.beta
        return zeta.clamp(max=1)

    def kl_surrogate(self, posterior: Posterior) -> Tensor:
        """A scalar of value 0 with an unbiased gradient of E_q[energy] - entropy, where no q exceeds 0.999.

        Bits are those that were drawn, but for the last group, which is summed over. A change of q moves only draws at
        z = 0, from where zeta grows continuously; on the left side, whose zeta is what the right side is inferred from,
        the signal is hence that of draws at 0, divided by their probability.
        """
        logits, q = posterior.logits, posterior.logits.sigmoid()
        last = q[:, -self.config.bits_per_group :]
        drawn = (posterior.latents[:, : -self.config.bits_per_group] > 0).to(q.dtype)
        bits = torch.cat([drawn, last], dim=1).detach()
        left, right = self.halves(bits)
        left_q, _ = self.halves(q.clamp(max=0.999))
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):  # as energies are
            weight, left_bias, right_bias = self.prior.boltzmann()
            left_pull = (1 - left) / (1 - left_q) * (right @ weight.T)
            right_pull = left @ weight
            biases = torch.cat([left_bias, right_bias])
            signal = logits - biases - torch.cat([left_pull, right_pull], dim=1)
        encoder = (signal * q.clamp(max=0.999)).sum(dim=1)
        # Biases take the means, couplings the bits: both without a gradient to the encoder
        energy = self.prior.energy(left, right)
        energy = energy - ((q.detach() - bits) * torch.cat([self.prior.left_bias, self.prior.right_bias])).sum(dim=1)
        surrogate = (encoder + energy).mean()
        return surrogate - surrogate.detach()

"""The discrete variational autoencoder with categorical latents and the networks of the binary models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.base import Codes, CodeSpec
from prior.factorial import Factorial
from tokenizer.latent_vae import Inferred, LatentVAE, LatentVAEConfig, Trained, check_at_least
from tokenizer.quantizers.base import straight_through
from tokenizer.quantizers.gumbel import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class GumbelSoftmaxConfig(LatentVAEConfig):
    """Configuration of `GumbelSoftmax`.

    Args:
        num_groups: groups of categoricals, each inferred given the ones before.
        latents_per_group: categoricals in each of them.
        num_categories: values K of each categorical.
        prior: p(c), {"type": "factorial"}, learned as in the paper.
        temperature_start: temperature of the relaxation at step 0.
        temperature_end: the lowest, from which on it stays; 0.5 is the paper's.
        temperature_decay: r in the paper's schedule, temperature_start * exp(-r step).
        straight_through: decode the categories drawn, with the gradient of the relaxed ones (the paper's section 2.2).
    """

    num_groups: int = 1
    latents_per_group: int = 20
    num_categories: int = 10
    prior: dict = field(default_factory=lambda: {"type": "factorial"})
    temperature_start: float = 1.0
    temperature_end: float = 0.5
    temperature_decay: float = 1e-4
    straight_through: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_groups=1, latents_per_group=1, num_categories=2, temperature_decay=0)
        if not 0 < self.temperature_end <= self.temperature_start:
            raise ValueError(
                "temperatures must be greater than 0 and must not rise, got temperature_start = "
                f"{self.temperature_start} and temperature_end = {self.temperature_end}"
            )


class GumbelSoftmax(LatentVAE):
    """Categorical variational autoencoder (Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017).

    The decoder trains on one-hot vectors relaxed by Gumbel noise and a softmax at a temperature that falls with the
    step; the KL term is that of the categoricals themselves, given the relaxed groups before, so that the objective is
    no bound before the temperature is low. What is evaluated is the discrete model. With k > 1 draws the loss is their
    mean. Codes are one level of categories, (B, N) in [0, K).

    Args:
        config: see `GumbelSoftmaxConfig`.
    """

    Config = GumbelSoftmaxConfig
    parts: ClassVar = {**LatentVAE.parts, "prior": {"factorial": Factorial}}

    def __init__(self, config: GumbelSoftmaxConfig):
        size, num_categories = config.latents_per_group, config.num_categories
        spec = CodeSpec(((config.num_groups * size,),), (num_categories,))
        super().__init__(config, spec, [size * num_categories] * config.num_groups)

    def temperature(self, step: int | None) -> float:
        config = self.config
        if step is None:
            return config.temperature_end
        # not math.exp: torch.compile would make a graph for each step
        return max(config.temperature_end, config.temperature_start * math.e ** (-config.temperature_decay * step))

    def objective(self, images: Tensor, *, step: int | None) -> Trained:
        features, before, codes, kls = self.features(images), [], [], []
        size, (log_prior,) = self.config.latents_per_group, self.prior.log_probs()
        for group, log_p in enumerate(log_prior.split(size, dim=1)):
            logits = self.network.infer(features, group, before)
            log_q = self._log_q(logits)
            relaxed = ((log_q + gumbel_noise(log_q)) / self.temperature(step)).softmax(dim=2)
            codes.append(relaxed.argmax(dim=2))
            if self.config.straight_through:
                relaxed = straight_through(relaxed, F.one_hot(codes[-1], relaxed.shape[2]).to(relaxed))
            before.append(relaxed.flatten(1).to(logits.dtype))  # the network's own type, for it to go on with
            kls.append((log_q.exp() * (log_q - log_p)).sum(dim=(1, 2)).mean())
        decoded = self.decode_latents(torch.cat(before, dim=1), features)
        kl_weight = self.kl_weight(step)
        losses = {
            "reconstruction": self.likelihood.nll(decoded.params, images).mean(),
            "kl": kl_weight * torch.stack(kls).sum(),
            **self.local_losses(decoded, kl_weight),
        }
        nats = {f"categoricals of group {group}": (kl, size) for group, kl in enumerate(kls)}
        return Trained(losses, (torch.cat(codes, dim=1),), decoded, nats)

    def infer(self, features: Sequence[Tensor], first: Tensor, sample: bool) -> Inferred:
        all_logits, before, codes, log_probs = [], [], [], []
        for group in range(self.config.num_groups):
            all_logits.append(self.network.infer(features, group, before) if before else first)
            log_q = self._log_q(all_logits[-1])
            codes.append((log_q + gumbel_noise(log_q) if sample else log_q).argmax(dim=2))
            log_probs.append(log_q.gather(2, codes[-1].unsqueeze(2)).sum(dim=(1, 2)))
            before.append(self.latents((codes[-1],)))
        self.check_encoded(*all_logits)
        return Inferred((torch.cat(codes, dim=1),), torch.cat(before, dim=1), torch.stack(log_probs).sum(dim=0))

    def latents(self, codes: Codes) -> Tensor:
        return F.one_hot(codes[0], self.config.num_categories).flatten(1).to(self.mean_image.dtype)

    def _log_q(self, logits: Tensor) -> Tensor:
        """log q of each category of a group's latents, (B, n_g, K) in float32, from the network's output."""
        return logits.float().unflatten(1, (-1, self.config.num_categories)).log_softmax(dim=2)

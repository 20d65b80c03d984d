"""Variational autoencoders with groups of binary latents: what DVAE, DVAE++, DVAE#, GumBolt, NVIL, VIMCO share.

They differ in how gradients reach the encoder while training. Everything else is one and the same: networks, prior, and
the discrete model that is evaluated.

Letters: G groups of bits, n bits in all, k draws per image. Units of a Boltzmann prior's left side are the first half
of the groups (of the bits, where there is one group).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.base import Codes, CodeSpec, Prior
from prior.bernoulli import Bernoulli
from prior.rbm import RBM
from tokenizer.latent_networks import Decoded
from tokenizer.latent_vae import Inferred, LatentVAE, LatentVAEConfig, Trained, check_at_least, importance_weighted

BINARY_PRIORS: dict[str, type[Prior]] = {"rbm": RBM, "bernoulli": Bernoulli}


@dataclass(frozen=True, kw_only=True)
class BinaryVAEConfig(LatentVAEConfig):
    """Configuration of tokenizers with binary latents.

    Args:
        num_groups: groups of bits, each inferred given the ones before; 1 or an even number.
        bits_per_group: bits in each of them.
        prior: p(z), learned jointly: {"type": "rbm" or "bernoulli", **options}.
    """

    num_groups: int = 1
    bits_per_group: int = 200
    prior: dict = field(default_factory=lambda: {"type": "rbm"})

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_groups=1, bits_per_group=1)
        if self.num_groups > 1 and self.num_groups % 2:
            raise ValueError(
                f"num_groups must be 1 or even, got {self.num_groups}: half of them are one side of the prior"
            )
        if self.num_groups * self.bits_per_group < 2:
            raise ValueError("the model needs at least two bits, one for each side of the prior")


class Posterior(NamedTuple):
    """A pass through the encoder with one draw per row: logits and latents (B, n), groups side by side.

    log_ratio: log r(zeta | 1) - log r(zeta | 0) of latents relaxed by a smoothing, None for others.
    """

    logits: Tensor
    latents: Tensor
    log_ratio: Tensor | None


class BinaryVAE(LatentVAE):
    """q(z | x) = prod_g Bernoulli(z_g | x, z_<g), p(x | z), and a prior p(z) learned with them.

    A subclass writes `bound`. Codes are one level, a vector of n bits.

    Raises:
        ValueError: an unknown part, or an option that a part does not have.
    """

    Config = BinaryVAEConfig
    parts: ClassVar = {**LatentVAE.parts, "prior": BINARY_PRIORS}

    def __init__(self, config: BinaryVAEConfig):
        group_sizes = [config.bits_per_group] * config.num_groups
        super().__init__(config, CodeSpec(((sum(group_sizes),),), (2,)), group_sizes)

    @abstractmethod
    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        """Losses whose sum is minimised, in nats per image, and the pass that they come from.

        Args:
            images: (B k, C, H, W), each image k times in a row.
            kl_weight: weight of the KL term.
        """

    def objective(self, images: Tensor, *, step: int | None) -> Trained:
        losses, posterior, decoded = self.bound(images, self.kl_weight(step))
        with torch.no_grad():  # what bits carry: how much their entropies drop when the image is known
            mean = posterior.logits.sigmoid().mean(dim=0)
            drop = entropy(mean.logit(1e-6)) - entropy(posterior.logits).mean(dim=0)
            size = self.config.bits_per_group
            nats = {f"bits of group {g}": (part.sum(), size) for g, part in enumerate(drop.split(size))}
        return Trained(losses, ((posterior.logits > 0).long(),), decoded, nats)

    def infer(self, features: Sequence[Tensor], first: Tensor, sample: bool) -> Inferred:
        all_logits, bits, log_q = [], [], []
        for group in range(self.config.num_groups):
            parameters = first if group == 0 else self.network.infer(features, group, bits)
            logits = self.posterior_logits(at_least_float32(parameters))
            drawn = torch.rand_like(logits) < logits.sigmoid() if sample else logits > 0
            all_logits.append(logits)
            bits.append(drawn.to(parameters.dtype))  # the network's own type, for it to go on with
            log_q.append(log_bernoulli(logits, drawn.to(logits.dtype)))
        self.check_encoded(*all_logits)
        latents = torch.cat(bits, dim=1)
        return Inferred((latents.long(),), latents, torch.stack(log_q).sum(dim=0))

    def latents(self, codes: Codes) -> Tensor:
        return codes[0]

    def posterior_logits(self, parameters: Tensor) -> Tensor:
        """Logits of q(z_g = 1 | x, z_<g) from the network's output for one group."""
        return parameters

    def training_pass(
        self, images: Tensor, draw: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[Posterior, Sequence[Tensor]]:
        """A differentiable pass through the groups, and the features of the images.

        Args:
            draw: a function of the parameters (B, outputs_per_latent * n_g) of one group, in float32 or better, to its
                logits, its latents and, in the place of the log ratio, anything else of that shape or None.
        """
        features = self.features(images)
        before, logits, latents, ratios = [], [], [], []
        for group in range(self.config.num_groups):
            parameters = self.network.infer(features, group, before)
            parts = draw(at_least_float32(parameters))
            for kept, part in zip((logits, latents, ratios), parts):
                kept.append(part)
            before.append(latents[-1].to(parameters.dtype))
        ratio = None if ratios[0] is None else torch.cat(ratios, dim=1)
        return Posterior(torch.cat(logits, dim=1), torch.cat(latents, dim=1), ratio), features

    def distortion(self, decoded: Decoded, images: Tensor) -> Tensor:
        """-log p(x | z) per row, (B,) nats."""
        return self.likelihood.nll(decoded.params, images)

    def importance_losses(self, log_weights: Tensor, kl_weight: float) -> dict[str, Tensor]:
        """Losses of log weights without log Z (B k,), nats: its value is left out, its gradient is the second's."""
        return {
            "bound_minus_log_partition": importance_weighted(log_weights, self.config.num_draws).mean(),
            "log_partition": kl_weight * self.prior.log_partition_loss(),
        }

    def halves(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) to the units of the prior's left and right side."""
        return units.split([self.prior.num_left, self.prior.num_right], dim=1)

    def complaints(self) -> dict[str, str]:
        """Groups of latents that carry nothing, and what the prior has to say."""
        return super().complaints() | self.prior.complaints()

    def decayed_weights(self) -> list[nn.Parameter]:
        couplings = [self.prior.weight] if isinstance(self.prior, RBM) else []
        return [*super().decayed_weights(), *couplings]


def at_least_float32(parameters: Tensor) -> Tensor:
    """For draws to follow log q: bfloat16 has 256 uniform numbers, the least of which is 0."""
    return parameters.to(torch.promote_types(parameters.dtype, torch.float32))


def log_bernoulli(logits: Tensor, bits: Tensor) -> Tensor:
    """log p(bits) of independent bits, (B,) nats."""
    return -F.binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each bit, in nats."""
    return F.softplus(logits) - logits * logits.sigmoid()

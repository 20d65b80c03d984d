"""The Gaussian variational autoencoder, with the usual ways of weighing its KL term."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from prior.base import Codes, CodeSpec
from prior.gaussian_mixture import GaussianMixture, log_normal
from tokenizer.distributed import mean_over_processes
from tokenizer.latent_networks import Decoded
from tokenizer.latent_vae import (
    Inferred,
    LatentVAE,
    LatentVAEConfig,
    Trained,
    check_at_least,
    importance_weighted,
)

# Of log standard deviations: exp of what lies beyond would leave float32 after one bad step
LARGEST_LOG_STD = 10.0


@dataclass(frozen=True, kw_only=True)
class GaussianVAEConfig(LatentVAEConfig):
    """Configuration of `GaussianVAE`.

    Args:
        latent_dim: latents n; 40 are those of Tomczak & Welling (2018, arXiv:1705.07120).
        prior: p(z), {"type": "gaussian_mixture", **options}; with one component nothing of it is learned.
        beta: weight of the KL term (Higgins et al. 2017); the objective is a bound on log p(x) where it is 1.
        free_nats: nats per latent, of the KL's mean over the batch, below which it is not lowered: the free bits of
            Kingma et al. (2016, arXiv:1606.04934, appendix C.8). Needs the standard normal prior and one draw.
    Raises:
        ValueError: a number out of range.
    """

    latent_dim: int = 40
    prior: dict = field(default_factory=lambda: {"type": "gaussian_mixture"})
    beta: float = 1.0
    free_nats: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, latent_dim=1, beta=0, free_nats=0)


class DiagonalNormal(NamedTuple):
    """q(z | x) = N(mean, diag exp(log_std)^2), each (B, n)."""

    mean: Tensor
    log_std: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> "DiagonalNormal":
        """From a network's output (B, 2 n), in float32."""
        mean, log_std = parameters.float().chunk(2, dim=1)
        return cls(mean, log_std.clamp(-LARGEST_LOG_STD, LARGEST_LOG_STD))

    def draw(self) -> Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        return log_normal(z, self.mean, self.log_std).sum(dim=1)

    def kl_to_standard(self) -> Tensor:
        """KL(q || N(0, 1)) of each latent, (B, n) nats (Kingma & Welling 2014, appendix B)."""
        return (self.mean.square() + (2 * self.log_std).exp() - 1) / 2 - self.log_std


class GaussianVAE(LatentVAE):
    """Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082).

    q(z | x) is normal with diagonal covariance, p(z) standard normal or a mixture. Codes are one level of n real
    numbers, the means of q when encoding without a draw. The KL term is analytic for the standard normal prior, else
    an estimate from the draw; with k > 1 draws the objective is the importance-weighted bound (Burda et al. 2016,
    arXiv:1509.00519).

    Args:
        config: see `GaussianVAEConfig`.
        num_classes: of a first level of the codes that holds the class, in subclasses that infer it; 0 for none.
    Raises:
        ValueError: free_nats with more than one draw or component.
    """

    Config = GaussianVAEConfig
    parts: ClassVar = {**LatentVAE.parts, "prior": {"gaussian_mixture": GaussianMixture}}
    outputs_per_latent = 2

    def __init__(self, config: GaussianVAEConfig, num_classes: int = 0):
        dim = config.latent_dim
        spec = CodeSpec(((1,), (dim,)), (num_classes, None)) if num_classes else CodeSpec(((dim,),), (None,))
        super().__init__(config, spec, [num_classes, dim] if num_classes else [dim], num_classes=num_classes)
        self.num_classes = num_classes
        self.is_standard = self.prior.config.num_components == 1
        if config.free_nats and not (self.is_standard and config.num_draws == 1):
            raise ValueError(
                f"free_nats = {config.free_nats} needs the KL of each latent, which only one draw and a prior of one "
                f"component give; got num_draws = {config.num_draws} and prior {config.prior}"
            )

    def objective(self, images: Tensor, *, step: int | None) -> Trained:
        features = self.features(images)
        q = DiagonalNormal.of(self.network.infer(features, 0, []))
        z = q.draw()
        decoded = self.decode_latents(z, features)
        losses, nats = self.bound(images, q, z, decoded, self.kl_weight(step))
        return Trained(losses, (z.detach(),), decoded, {"latents z": (nats, self.config.latent_dim)})

    def bound(
        self, images: Tensor, q: DiagonalNormal, z: Tensor, decoded: Decoded, kl_weight: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses that stand for minus the bound, and KL(q(z | x) || p(z)), the batch's mean, in nats per image."""
        config, distortion = self.config, self.likelihood.nll(decoded.params, images)
        if self.is_standard and config.num_draws == 1:
            of_latents = q.kl_to_standard().mean(dim=0)
            if config.free_nats and self.training:  # of all the step's images, whatever process has them
                of_latents = mean_over_processes(of_latents)
            nats, charged = of_latents.sum(), of_latents.clamp(min=config.free_nats).sum()
        else:
            kl = q.log_prob(z) - self.prior.log_density(z)
            nats = charged = kl.mean()
        if config.num_draws > 1:
            local = self.local_cost(decoded, kl_weight, config.num_draws)
            log_weights = -distortion - config.beta * (kl_weight * kl + local)
            return {"bound": importance_weighted(log_weights, config.num_draws).mean()}, nats
        local = {name: config.beta * loss for name, loss in self.local_losses(decoded, kl_weight).items()}
        return {"reconstruction": distortion.mean(), "kl": config.beta * kl_weight * charged, **local}, nats

    def infer(self, features: Sequence[Tensor], first: Tensor, sample: bool) -> Inferred:
        q = DiagonalNormal.of(first)
        self.check_encoded(*q)
        z = q.draw() if sample else q.mean
        return Inferred((z,), z, q.log_prob(z))

    def latents(self, codes: Codes) -> Tensor:
        return codes[0]

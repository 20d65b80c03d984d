"""What turns images into the parameters of latent vectors, and latent vectors into the parameters of images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class LocalGroup(NamedTuple):
    """One group of continuous latents h that a decoder draws on its way from codes to pixels.

    kl: (B,) nats, KL(q(h | x, z) || p(h | z)) given the groups before; log_ratio: (B,) nats, log p(h | z) -
    log q(h | x, z) at the draw; num_dims: of h per image.
    """

    kl: Tensor
    log_ratio: Tensor
    num_dims: int


class Decoded(NamedTuple):
    """params: (B, num_channels, H, W) for the likelihood; local: by name, empty where no h was inferred."""

    params: Tensor
    local: dict[str, LocalGroup]


# Standard normal noise of the shape of its argument (B, ...)
Noise = Callable[[Tensor], Tensor]


class LatentNetwork(nn.Module, ABC):
    """The networks of a variational autoencoder with groups of latent vectors, q(z_g | x, z_<g) and p(x | z).

    A subclass is built from `image_shape`, `group_sizes` (latents per group, in the order in which they are inferred),
    `outputs_per_latent` (1: a logit) and `params_channels` of the decoder's output, and its own options.

    Attributes:
        has_local: whether the decoder draws continuous latents of its own.
    """

    has_local = False

    @abstractmethod
    def features(self, images: Tensor) -> Sequence[Tensor]:
        """What is computed once per image, from images (B, C, H, W) from which the mean image was taken."""

    @abstractmethod
    def infer(self, features: Sequence[Tensor], group: int, before: Sequence[Tensor]) -> Tensor:
        """(B, outputs_per_latent * group_sizes[group]) parameters of q(z_g | x, z_<g); `before` holds z_<g."""

    @abstractmethod
    def decode(self, latents: Tensor, features: Sequence[Tensor] | None, noise: Noise | None) -> Decoded:
        """Parameters of p(x | z, h) for latents (B, N).

        Local latents h are drawn from q(h | x, z) where features are given, else from p(h | z), with `noise`; None
        takes their means.
        """

    def decayed_weights(self) -> list[nn.Parameter]:
        """Kernels and gains of batch norms: what weight decay applies to."""
        gains = [m.weight for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [p for p in self.parameters() if p.ndim > 1] + gains

"""Convolutional networks with global bits and, on the way down, local continuous latents."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.latent_networks.base import Decoded, LatentNetwork, LocalGroup, Noise
from tokenizer.networks.group_norm import GroupNorm


class Conv(LatentNetwork):
    """Residual squeeze-and-excitation networks with local latents at several scales.

    The model is that of DVAE++'s images (Vahdat et al. 2018, arXiv:1802.04920, section 5.2): p(z) prod_s p(h_s | h_<s,
    z) p(x | h, z), all h normal.

    The encoder halves the image to its coarsest map, from which the bits are inferred. The decoder starts from the bits
    alone, doubles its map step by step, and at each scale draws a map h_s: from a normal distribution that follows from
    its own state, or, to infer it, from one that sees the encoder's map of that scale too. Sizes are our own; the paper
    does not give them.

    Args:
        image_shape: (C, H, W); sides that are no multiple of the coarsest pixel are padded and cropped again.
        group_sizes: latents per group.
        outputs_per_latent: parameters of q per latent.
        params_channels: channels of the decoder's output.
        hidden_dims: channels per scale from coarse to fine; the last is that of the image, each other half as large.
        local_dims: channels of h per scale from coarse to fine, 0 for none; empty for no local latents at all.
        num_blocks: residual blocks per scale, in the encoder and in the decoder.
        global_dim: width of the layer between the coarsest map and the bits.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        group_sizes: Sequence[int],
        outputs_per_latent: int,
        params_channels: int,
        hidden_dims: tuple[int, ...] = (128, 64, 64, 32),
        local_dims: tuple[int, ...] = (8, 8, 4, 0),
        num_blocks: int = 1,
        global_dim: int = 256,
    ):
        super().__init__()
        hidden_dims, local_dims = tuple(hidden_dims), tuple(local_dims) or (0,) * len(hidden_dims)
        if not hidden_dims or min(*hidden_dims, num_blocks, global_dim) < 1:
            raise ValueError(
                "hidden_dims, num_blocks and global_dim must be at least 1, "
                f"got {hidden_dims}, {num_blocks}, {global_dim}"
            )
        if len(local_dims) != len(hidden_dims) or min(local_dims) < 0:
            raise ValueError(
                f"local_dims needs a number of at least 0 for each of the {len(hidden_dims)} scales, got {local_dims}"
            )
        self.image_size = image_shape[1:]
        self.coarsest_pixel = 2 ** (len(hidden_dims) - 1)
        coarsest = tuple(-(-side // self.coarsest_pixel) for side in self.image_size)
        self.coarsest_shape = (hidden_dims[0], *coarsest)
        self.has_local = any(local_dims)
        self.local_names = [f"local latents {coarsest[0] * 2**i}x{coarsest[1] * 2**i}" for i in range(len(hidden_dims))]

        fine_to_coarse = hidden_dims[::-1]
        self.stem = nn.Conv2d(image_shape[0], fine_to_coarse[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if i == 0 else nn.Conv2d(fine_to_coarse[i - 1], dim, 4, stride=2, padding=1),
                *(ResidualBlock(dim) for _ in range(num_blocks)),
            )
            for i, dim in enumerate(fine_to_coarse)
        )
        size = math.prod(self.coarsest_shape)
        self.summary = nn.Sequential(nn.Flatten(), nn.Linear(size, global_dim), nn.SiLU())
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(global_dim + sum(group_sizes[:g]), global_dim),
                nn.SiLU(),
                nn.Linear(global_dim, outputs_per_latent * group_size),
            )
            for g, group_size in enumerate(group_sizes)
        )
        self.start = nn.Linear(sum(group_sizes), size)
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if i == 0 else Upsample(hidden_dims[i - 1], dim),
                *(ResidualBlock(dim) for _ in range(num_blocks)),
            )
            for i, dim in enumerate(hidden_dims)
        )
        self.locals = nn.ModuleList(
            LocalLatents(dim, local_dim) if local_dim else None for dim, local_dim in zip(hidden_dims, local_dims)
        )
        self.head = nn.Sequential(
            ResidualBlock(hidden_dims[-1]), nn.SiLU(), nn.Conv2d(hidden_dims[-1], params_channels, 3, padding=1)
        )

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The summary vector, then the encoder's maps from coarse to fine."""
        height, width = self.image_size
        multiple = self.coarsest_pixel
        maps, x = [], self.stem(F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate"))
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        return [self.summary(x), *maps[::-1]]

    def infer(self, features: Sequence[Tensor], group: int, before: Sequence[Tensor]) -> Tensor:
        return self.heads[group](torch.cat([features[0], *before], dim=1))

    def decode(self, latents: Tensor, features: Sequence[Tensor] | None, noise: Noise | None) -> Decoded:
        x = self.start(latents).unflatten(1, self.coarsest_shape)
        local = {}
        for i, (stage, latents_here) in enumerate(zip(self.up, self.locals)):
            x = stage(x)
            if latents_here is not None:
                x, group = latents_here(x, None if features is None else features[1 + i], noise)
                if group is not None:
                    local[self.local_names[i]] = group
        height, width = self.image_size
        return Decoded(self.head(x)[:, :, :height, :width], local)


class LocalLatents(nn.Module):
    """Normal latents of one scale, (B, dim, h, w) to the same with the draw added.

    The posterior is parameterised by its distance from the prior, as in NVAE (Vahdat & Kautz 2020, arXiv:2007.03898).
    """

    def __init__(self, dim: int, local_dim: int):
        super().__init__()
        self.local_dim = local_dim
        self.prior = nn.Sequential(nn.SiLU(), nn.Conv2d(dim, 2 * local_dim, 3, padding=1))
        self.posterior = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * dim, 2 * local_dim, 3, padding=1))
        self.merge = nn.Conv2d(local_dim, dim, 1)
        for layer in (self.prior[1], self.posterior[1]):  # the posterior starts as the prior, and that as N(0, 1)
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor, encoded: Tensor | None, noise: Noise | None) -> tuple[Tensor, LocalGroup | None]:
        mean, log_scale = _bounded(self.prior(x))
        if encoded is None:
            return x + self._merged(mean + _draw(log_scale, noise)), None
        shift, log_ratio = _bounded(self.posterior(torch.cat([x, encoded], dim=1)))
        # In units of the prior: p is N(0, 1), q is N(shift, exp(log_ratio)^2)
        e = shift + _draw(log_ratio, noise)
        kl = (shift.square() + torch.exp(2 * log_ratio) - 1) / 2 - log_ratio
        standardized = (e - shift) * torch.exp(-log_ratio)
        log_p_over_q = (standardized.square() - e.square()) / 2 + log_ratio
        group = LocalGroup(kl.flatten(1).sum(1), log_p_over_q.flatten(1).sum(1), kl.shape[1:].numel())
        return x + self._merged(mean + log_scale.exp() * e), group

    def _merged(self, h: Tensor) -> Tensor:
        return self.merge(h.to(self.merge.weight.dtype))  # latents are float32 also where weights are not


def _bounded(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log scale in float32 or better, softly within 5 of 0, so that no scale can overflow."""
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    mean, log_scale = (5 * torch.tanh(part / 5) for part in parameters.chunk(2, dim=1))
    return mean, log_scale


def _draw(log_scale: Tensor, noise: Noise | None) -> Tensor | float:
    return 0.0 if noise is None else log_scale.exp() * noise(log_scale)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm and a squeeze-and-excitation gate (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, dim: int):
        super().__init__()
        self.body = nn.Sequential(
            GroupNorm(8, dim),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            GroupNorm(8, dim),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        squeezed = max(4, dim // 8)
        self.gate = nn.Sequential(nn.Linear(dim, squeezed), nn.SiLU(), nn.Linear(squeezed, dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + self.gate(y.mean(dim=(2, 3)))[:, :, None, None] * y


class Upsample(nn.Module):
    """Twice the height and width, then a convolution."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))

"""Residual blocks with group normalisation and optional attention: the networks of VQGAN."""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.networks.factor import num_halvings
from tokenizer.networks.group_norm import GroupNorm

EPS = 1e-6  # of the normalisation, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """Encoder and decoder of VQGAN (Esser et al. 2021, arXiv:2012.09841, table 7).

    Per resolution some residual blocks (GroupNorm, SiLU, 3x3), then a strided convolution, or nearest upsampling and a
    convolution. At the lowest resolution: residual block, self-attention, residual block.

    Args:
        hidden_dim: channels at the highest resolution.
        dim_multipliers: channels of each resolution as multiples of hidden_dim, from high to low; the last one serves
            all further halvings.
        num_residual_blocks: residual blocks per resolution; the decoder has one more, as in the paper.
        attention: self-attention at the lowest resolution.
        num_groups: groups of the normalisation; their greatest common divisor with the channels where it does not fit.
    Raises:
        ValueError: a size below 1, or no multiplier.
    """

    hidden_dim: int = 128
    dim_multipliers: tuple[int, ...] = (1, 2, 4)
    num_residual_blocks: int = 2
    attention: bool = True
    num_groups: int = 32

    def __post_init__(self):
        object.__setattr__(self, "dim_multipliers", tuple(self.dim_multipliers))  # JSON and YAML give lists
        sizes = (self.hidden_dim, self.num_residual_blocks, self.num_groups, *self.dim_multipliers)
        if not self.dim_multipliers or min(sizes) < 1:
            raise ValueError(f"the resnet network needs sizes of at least 1 and a multiplier, got {self}")

    def encoder(self, in_channels: int, out_channels: int, downsample_factor: int) -> nn.Module:
        widths = self._widths(downsample_factor)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                # Padded right and below only, as in the authors' code.
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
            layers += self._blocks(channels, width, self.num_residual_blocks)
            channels = width
        return nn.Sequential(*layers, *self._middle(channels), *self._head(channels, out_channels))

    def decoder(self, in_channels: int, out_channels: int, upsample_factor: int) -> nn.Module:
        widths = self._widths(upsample_factor)[::-1]
        channels = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1), *self._middle(channels)]
        for level, width in enumerate(widths):
            if level > 0:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)]
            layers += self._blocks(channels, width, self.num_residual_blocks + 1)
            channels = width
        return nn.Sequential(*layers, *self._head(channels, out_channels))

    def _widths(self, factor: int) -> list[int]:
        """Channels per resolution, from high to low."""
        multipliers = self.dim_multipliers
        return [
            self.hidden_dim * multipliers[min(level, len(multipliers) - 1)] for level in range(num_halvings(factor) + 1)
        ]

    def _blocks(self, in_channels: int, out_channels: int, num_blocks: int) -> list[nn.Module]:
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        return [_ResidualBlock(channels, out_channels, self.num_groups) for channels in inputs]

    def _middle(self, channels: int) -> list[nn.Module]:
        block, other = (_ResidualBlock(channels, channels, self.num_groups) for _ in range(2))
        return [block, _Attention(channels, self.num_groups), other] if self.attention else [block, other]

    def _head(self, channels: int, out_channels: int) -> list[nn.Module]:
        return [GroupNorm(self.num_groups, channels, EPS), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)]


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.skip(x) + residual


class _Attention(nn.Module):
    """One head over all positions, with 1x1 convolutions for query, key, value and output."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, EPS)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        q, k, v = rearrange(self.query_key_value(self.norm(x)), "b (n c) h w -> n b 1 (h w) c", n=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b 1 (h w) c -> b c h w", h=height))

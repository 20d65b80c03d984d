"""Strided convolutions and residual blocks: the networks of VQ-VAE and VQ-VAE-2."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.networks.factor import num_halvings


@dataclass(frozen=True, kw_only=True)
class Conv:
    """Encoder and decoder of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section 4.1).

    Those of VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446) are of the same kind. One strided 4x4 convolution per
    halving, then residual blocks (3x3, then 1x1, with ReLU); the decoder mirrors it with transposed convolutions. The
    first and last layers at image resolution have half the channels.

    Args:
        hidden_dim: channels; 128 as in the authors' code.
        num_residual_blocks: residual blocks of each half.
        residual_dim: channels between the two convolutions of a residual block.
    Raises:
        ValueError: hidden_dim below 2, residual_dim below 1, num_residual_blocks below 0.
    """

    hidden_dim: int = 128
    num_residual_blocks: int = 2
    residual_dim: int = 32

    def __post_init__(self):
        if self.hidden_dim < 2 or self.residual_dim < 1 or self.num_residual_blocks < 0:
            raise ValueError(
                f"the conv network needs hidden_dim >= 2, residual_dim >= 1 and num_residual_blocks >= 0, got {self}"
            )

    def encoder(self, in_channels: int, out_channels: int, downsample_factor: int) -> nn.Module:
        layers, channels = [], in_channels
        for halving in range(num_halvings(downsample_factor)):
            width = self.hidden_dim // 2 if halving == 0 else self.hidden_dim
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        return nn.Sequential(
            *layers,
            nn.Conv2d(channels, self.hidden_dim, 3, padding=1),
            *self._residual_stack(),
            nn.Conv2d(self.hidden_dim, out_channels, 1),
        )

    def decoder(self, in_channels: int, out_channels: int, upsample_factor: int) -> nn.Module:
        doublings = num_halvings(upsample_factor)
        layers, channels = [], self.hidden_dim
        for left in range(doublings - 1, 0, -1):
            width = self.hidden_dim // 2 if left == 1 else self.hidden_dim
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        last = nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1)
        if doublings == 0:
            last = nn.Conv2d(channels, out_channels, 3, padding=1)
        return nn.Sequential(
            nn.Conv2d(in_channels, self.hidden_dim, 3, padding=1), *self._residual_stack(), *layers, last
        )

    def _residual_stack(self) -> list[nn.Module]:
        blocks = [_ResidualBlock(self.hidden_dim, self.residual_dim) for _ in range(self.num_residual_blocks)]
        return [*blocks, nn.ReLU()]


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, residual_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, residual_dim, 3, padding=1)
        self.conv2 = nn.Conv2d(residual_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))

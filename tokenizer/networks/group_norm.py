"""Group normalisation that leaves something of the smallest maps."""

import math

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of maps (B, C, h, w), in gcd(num_groups, C) groups.

    Where each group would hold a single value, at 1 x 1 with a channel a group, all channels are one group: one value,
    less its mean, is 0 whatever it was, and nothing of the image would be left.

    Args:
        num_groups: groups where they divide the channels.
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, num_groups: int, channels: int, eps: float = 1e-5):
        super().__init__(math.gcd(num_groups, channels), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        num_groups = 1 if x.shape[1:].numel() == self.num_groups else self.num_groups
        # not torch.nn.functional's, which refuses a single image of one value a group
        return torch.group_norm(x, num_groups, self.weight, self.bias, self.eps)

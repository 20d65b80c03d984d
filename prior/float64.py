"""float64, which Apple's GPUs do not have: what needs it is computed on the CPU there."""

import torch
from torch import Tensor

WITHOUT = ("mps",)


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT else device


def in_float64(x: Tensor) -> Tensor:
    return x.to(float64_device(x.device), torch.float64)

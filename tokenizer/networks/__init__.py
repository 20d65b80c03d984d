"""Encoder and decoder families by name. A new one is one file, and one line here.

An entry is a class that holds the options and makes both halves:
    encoder(in_channels, out_channels, downsample_factor): (B, in, H, W) to (B, out, H / factor, W / factor)
    decoder(in_channels, out_channels, upsample_factor):   (B, in, h, w) to (B, out, h * factor, w * factor)
A factor is a power of two (`num_halvings` refuses others). A decoder is an nn.Sequential whose last layer has a bias:
training starts it at the likelihood's `initial_params`.
"""

from tokenizer.networks.conv import Conv
from tokenizer.networks.resnet import ResNet

NETWORKS: dict[str, type] = {
    "conv": Conv,
    "resnet": ResNet,
}

__all__ = ["NETWORKS", "Conv", "ResNet"]

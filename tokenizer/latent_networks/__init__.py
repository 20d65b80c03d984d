"""Networks between images and groups of latent vectors."""

from tokenizer.latent_networks.base import Decoded, LatentNetwork, LocalGroup, Noise
from tokenizer.latent_networks.conv import Conv
from tokenizer.latent_networks.mlp import MLP

LATENT_NETWORKS: dict[str, type[LatentNetwork]] = {"conv": Conv, "mlp": MLP}

__all__ = ["LATENT_NETWORKS", "Decoded", "LatentNetwork", "LocalGroup", "Noise"]

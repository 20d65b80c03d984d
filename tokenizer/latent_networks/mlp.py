"""The fully connected networks of the DVAE papers' MNIST and OMNIGLOT models."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.distributed import is_distributed, mean_over_processes
from tokenizer.latent_networks.base import Decoded, LatentNetwork, Noise


class MLP(LatentNetwork):
    """Hidden layers of affine map, batch norm, tanh (Vahdat et al. 2018, arXiv:1802.04920; 2018b, arXiv:1805.07445).

    With num_layers = 0 every map is affine: the structure that the papers write 1-; with 2 layers of 200 it is 1~ (one
    group), 2~ or 4~.

    Args:
        image_shape: (C, H, W).
        group_sizes: latents per group.
        outputs_per_latent: parameters of q per latent.
        params_channels: channels of the decoder's output.
        hidden_dim: width of the hidden layers.
        num_layers: hidden layers of each map.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        group_sizes: Sequence[int],
        outputs_per_latent: int,
        params_channels: int,
        hidden_dim: int = 200,
        num_layers: int = 2,
    ):
        if hidden_dim < 1 or num_layers < 0:
            raise ValueError(
                f"hidden_dim must be at least 1 and num_layers at least 0, got {hidden_dim} and {num_layers}"
            )
        super().__init__()
        num_pixels = math.prod(image_shape)
        self.params_shape = (params_channels, *image_shape[1:])
        self.encoders = nn.ModuleList(
            _layers(num_pixels + sum(group_sizes[:g]), size * outputs_per_latent, hidden_dim, num_layers)
            for g, size in enumerate(group_sizes)
        )
        self.decoder = _layers(sum(group_sizes), math.prod(self.params_shape), hidden_dim, num_layers)

    def features(self, images: Tensor) -> Sequence[Tensor]:
        return [images.flatten(1)]

    def infer(self, features: Sequence[Tensor], group: int, before: Sequence[Tensor]) -> Tensor:
        return self.encoders[group](torch.cat([*features, *before], dim=1))

    def decode(self, latents: Tensor, features: Sequence[Tensor] | None, noise: Noise | None) -> Decoded:
        return Decoded(self.decoder(latents).unflatten(1, self.params_shape), {})


def _layers(in_features: int, out_features: int, hidden_dim: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        # running statistics follow the last ten or so batches: training sees relaxed latents, evaluation binary ones
        layers += [_affine(in_features, hidden_dim), BatchNorm(hidden_dim, eps=1e-2, momentum=0.2), nn.Tanh()]
        in_features = hidden_dim
    return nn.Sequential(*layers, _affine(in_features, out_features))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of rows (B, D), in training by the moments of all processes' rows, equally many on each.

    torch's own SyncBatchNorm does not run on CPUs. Accumulated micro-batches are normalised one by one.

    Raises:
        ValueError: training on one row, whose variance is 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        num_rows = len(x) * (dist.get_world_size() if is_distributed() else 1)
        if num_rows < 2:
            raise ValueError(
                f"batch norm needs micro-batches of at least 2 rows to train, got {num_rows}; raise "
                "training.batch_size or lower training.gradient_accumulation_steps, or set network.num_layers to 0"
            )
        y, mean, variance = self._by_moments(x, num_rows) if is_distributed() else self._by_torch(x)
        self.num_batches_tracked += 1
        # Under fp16 a step whose features overflow is left out by the optimizer, and so it must be here
        is_number = mean.isfinite().all() & variance.isfinite().all()
        for running, moved in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(is_number, moved, running))
        return y

    def _by_torch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows normalised, and the running moments after them."""
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
        return y, mean, variance

    def _by_moments(self, x: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # moments in float32
            rows = x.to(self.running_mean.dtype)
            mean = mean_over_processes(rows.mean(dim=0))
            variance = mean_over_processes((rows - mean).square().mean(dim=0))
            unbiased = variance.detach() * num_rows / (num_rows - 1)
            y = ((rows - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)
            moments = (self.running_mean, mean.detach()), (self.running_var, unbiased)
            return y, *(running.lerp(of_batch, self.momentum) for running, of_batch in moments)


def _affine(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    std = math.sqrt(2 / in_features)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer

"""An autoencoder with one quantized feature map."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.base import Codes, CodeSpec, PriorConfig
from prior.uniform import Uniform
from tokenizer.base import PosteriorDraw, Tokenizer, TokenizerConfig, TokenizerOutput
from tokenizer.likelihoods import LIKELIHOODS
from tokenizer.networks import NETWORKS
from tokenizer.networks.factor import num_halvings
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.base import Quantizer
from tokenizer.registry import build


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(TokenizerConfig):
    """Configuration of `VQVAE`.

    Args:
        downsample_factor: pixels per code along each side, a power of two; other image sizes are padded.
        latent_dim: channels between the networks and the 1x1 convolutions around the quantizer.
        network: encoder and decoder, {"type": name, **options}.
        quantizer: {"type": name, **options}.
        likelihood: p(x | z), {"type": name, **options}.
    """

    downsample_factor: int = 4
    latent_dim: int = 64
    network: dict = field(default_factory=lambda: {"type": "conv"})
    quantizer: dict = field(default_factory=lambda: {"type": "ema_vq", "codebook_size": 512})
    likelihood: dict = field(default_factory=lambda: {"type": "normal"})

    def __post_init__(self):
        super().__post_init__()
        num_halvings(self.downsample_factor, "downsample_factor")
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")


class VQVAE(Tokenizer):
    """VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937), with any network, quantizer and likelihood.

    With the resnet network and the laplace likelihood it is the autoencoder of VQGAN. A quantizer with several codes
    per position (residual, factored) makes several levels of codes, all of the same shape.

    Args:
        config: see `VQVAEConfig`.
    Raises:
        ValueError: an unknown part, or an option that a part does not have.
    """

    Config = VQVAEConfig
    channels_last = True
    parts: ClassVar = {"network": NETWORKS, "quantizer": QUANTIZERS, "likelihood": LIKELIHOODS}

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        channels, height, width = config.image_shape
        factor, latent_dim = config.downsample_factor, config.latent_dim
        network = build("network", NETWORKS, config.network)
        self.quantizer = build("quantizer", QUANTIZERS, config.quantizer)
        self.likelihood = build("likelihood", LIKELIHOODS, config.likelihood, image_channels=channels)
        self.encoder = network.encoder(channels, latent_dim, factor)
        self.to_quantizer = nn.Conv2d(latent_dim, self.quantizer.in_channels, 1)
        self.from_quantizer = nn.Conv2d(self.quantizer.out_channels, latent_dim, 1)
        self.decoder = network.decoder(latent_dim, self.likelihood.num_channels, factor)
        vocab_sizes = self.quantizer.vocab_sizes
        self.spec = CodeSpec(((-(-height // factor), -(-width // factor)),) * len(vocab_sizes), vocab_sizes)
        self.prior = Uniform(PriorConfig(spec=self.spec))

    def forward(self, images: Tensor, step: int | None = None) -> TokenizerOutput:
        self.check_images(images)
        quantized = self.quantizer(self._features(images), step)
        params = self._params(quantized.z)
        losses = {**self.likelihood.losses(params, images), **quantized.losses}
        return TokenizerOutput(self.likelihood.mean(params), quantized.codes, losses)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False) -> Codes:
        self.check_images(images)
        return self.quantizer.encode(self._features(images), sample)

    @torch.no_grad()
    def decode(self, codes: Codes, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        self.spec.check(codes)
        return self.likelihood.mean(self._params(self.quantizer.embed(codes)))

    @property
    def code_strides(self) -> tuple[int, ...]:
        return (self.config.downsample_factor,) * self.spec.num_levels

    @torch.no_grad()
    def embed(self, codes: Codes) -> tuple[Tensor]:
        self.spec.check(codes)
        return (self.quantizer.embed(codes),)

    @torch.no_grad()
    def decode_embedded(self, vectors: tuple[Tensor]) -> Tensor:
        (z,) = vectors
        return self.likelihood.mean(self._params(z))

    def nll(self, images: Tensor, codes: Codes) -> Tensor:
        self.check_images(images)
        self.spec.check(codes)
        return self.likelihood.nll(self._params(self.quantizer.embed(codes)), images)

    @property
    def is_stochastic(self) -> bool:
        return self.quantizer.is_stochastic

    @torch.no_grad()
    def draw_posterior(self, images: Tensor) -> PosteriorDraw:
        self.check_images(images)
        codes, log_q = self.quantizer.draw(self._features(images))
        return PosteriorDraw(codes, log_q, -self.nll(images, codes))

    def initialize(self, images: Tensor) -> None:
        initialize_by_data(self, images, {self.to_quantizer: self.quantizer}, self.decoder[-1])

    def after_step(self) -> None:
        self.quantizer.after_step()

    def _features(self, images: Tensor) -> Tensor:
        images = pad_to_multiple(images, self.config.downsample_factor)
        return self.to_quantizer(self.encoder(to_channels_last(2 * images - 1)))

    def _params(self, z: Tensor) -> Tensor:
        _, height, width = self.config.image_shape
        z = z.to(self.from_quantizer.weight.dtype)  # quantizers without weights give float32
        return self.decoder(self.from_quantizer(z))[:, :, :height, :width]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column until both sides are multiples; the decoder's output is cropped again."""
    height, width = images.shape[2:]
    if height % multiple == 0 and width % multiple == 0:
        return images
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def to_channels_last(images: Tensor) -> Tensor:
    """The same (B, C, H, W) with the channels side by side in memory, as the quantizer wants its vectors.

    Convolutions are a tenth faster so and hand the layout on. `contiguous` would leave that of one channel undecided.
    """
    return images.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


@torch.no_grad()
def initialize_by_data(
    tokenizer: Tokenizer, images: Tensor, quantizers: dict[nn.Module, Quantizer], last_layer: nn.Module
) -> None:
    """A training pass, in which each quantizer starts from its own input; without gradients it leaves no statistics.

    Args:
        quantizers: each with the convolution before it. Where the quantizer's scale is fixed, the convolution is
            rescaled to features of mean 0 and deviation 1 (Salimans and Kingma 2016, arXiv:1602.07868, section 3).
        last_layer: of the decoder, which starts at the likelihood's `initial_params`.
    """
    params = tokenizer.likelihood.initial_params(images)
    if params is not None:
        last_layer.bias.copy_(params)
    training = tokenizer.training
    tokenizer.train()
    hooks = [conv.register_forward_hook(_standardize) for conv, q in quantizers.items() if q.has_fixed_scale]
    tokenizer(images)
    for hook in hooks:
        hook.remove()
    tokenizer.train(training)


def _standardize(conv: nn.Conv2d, inputs: tuple[Tensor], features: Tensor) -> Tensor:
    """Changes the convolution so that each channel of this output has mean 0 and deviation 1; returns that output."""
    deviation, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0)
    scale = torch.where(deviation > 0, 1 / deviation, 1)  # a channel that says nothing has no scale
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias.copy_((conv.bias - mean) * scale)
    return (features - mean[:, None, None]) * scale[:, None, None]

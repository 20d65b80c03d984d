"""An autoencoder with a pyramid of quantized feature maps, coarse to fine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
from tokenizer.registry import build
from tokenizer.vqvae import initialize_by_data, pad_to_multiple, to_channels_last


@dataclass(frozen=True, kw_only=True)
class VQVAE2Config(TokenizerConfig):
    """Configuration of `VQVAE2`. Lists go from the coarsest level to the finest.

    Args:
        downsample_factors: pixels per code along each side, one power of two per level, each smaller than the one
            before; images are padded to a multiple of the first.
        codebook_sizes: codebook size of each level; None takes the quantizer's for all.
        latent_dim: channels between the networks and the 1x1 convolutions around the quantizers.
        network: encoders and decoders, {"type": name, **options}.
        quantizer: the quantizer of each level, {"type": name, **options}.
        likelihood: p(x | z), {"type": name, **options}.
    """

    downsample_factors: tuple[int, ...] = (8, 4)
    codebook_sizes: tuple[int, ...] | None = None
    latent_dim: int = 64
    network: dict = field(default_factory=lambda: {"type": "conv"})
    quantizer: dict = field(default_factory=lambda: {"type": "ema_vq", "codebook_size": 512})
    likelihood: dict = field(default_factory=lambda: {"type": "normal"})

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "downsample_factors", tuple(self.downsample_factors))  # JSON and YAML give lists
        factors = self.downsample_factors
        if not factors or any(coarse <= fine for coarse, fine in pairwise(factors)):
            raise ValueError(f"downsample_factors must decrease from coarse to fine, e.g. (8, 4), got {factors}")
        for factor in factors:
            num_halvings(factor, "each of downsample_factors")
        if self.codebook_sizes is not None:
            object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
            if len(self.codebook_sizes) != len(factors):
                raise ValueError(
                    f"codebook_sizes needs one entry for each of the {len(factors)} levels, got {self.codebook_sizes}"
                )
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")

    def quantizer_options(self, level: int) -> dict:
        """The quantizer's options with the level's own codebook size."""
        if self.codebook_sizes is None:
            return self.quantizer
        return {**self.quantizer, "codebook_size": self.codebook_sizes[level]}


class VQVAE2(Tokenizer):
    """VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446, section 3.1), with any number of levels.

    Features are computed from fine to coarse, and quantized from coarse to fine: each level quantizes its features
    joined with the decoded level above, so it only adds what the coarser code lacks. The decoder sees all levels,
    repeated to the size of the finest; the authors upsample with transposed convolutions instead.

    Args:
        config: see `VQVAE2Config`.
    Raises:
        ValueError: an unknown part, or an option that a part does not have.
    """

    Config = VQVAE2Config
    channels_last = True
    parts: ClassVar = {"network": NETWORKS, "quantizer": QUANTIZERS, "likelihood": LIKELIHOODS}

    def __init__(self, config: VQVAE2Config):
        super().__init__(config)
        channels, height, width = config.image_shape
        factors, latent_dim = config.downsample_factors, config.latent_dim
        levels = range(len(factors))
        # Factor between a level and the next finer one; between the finest and the image for the last.
        ratios = [coarse // fine for coarse, fine in zip(factors, [*factors[1:], 1])]
        inputs = [latent_dim] * (len(factors) - 1) + [channels]
        network = build("network", NETWORKS, config.network)
        self.likelihood = build("likelihood", LIKELIHOODS, config.likelihood, image_channels=channels)
        self.quantizers = nn.ModuleList(
            build("quantizer", QUANTIZERS, config.quantizer_options(level)) for level in levels
        )
        self.encoders = nn.ModuleList(network.encoder(inputs[level], latent_dim, ratios[level]) for level in levels)
        self.to_quantizers = nn.ModuleList(
            nn.Conv2d(latent_dim if level == 0 else 2 * latent_dim, self.quantizers[level].in_channels, 1)
            for level in levels
        )
        self.from_quantizers = nn.ModuleList(
            nn.Conv2d(quantizer.out_channels, latent_dim, 1) for quantizer in self.quantizers
        )
        # decoders[l] shows level l to level l + 1; the last one makes the image.
        self.decoders = nn.ModuleList(network.decoder(latent_dim, latent_dim, ratio) for ratio in ratios[:-1])
        self.decoders.append(network.decoder(len(factors) * latent_dim, self.likelihood.num_channels, ratios[-1]))
        rows, columns = (-(-side // factors[0]) * factors[0] for side in (height, width))
        self.spec = CodeSpec(
            tuple((rows // f, columns // f) for f, q in zip(factors, self.quantizers) for _ in q.vocab_sizes),
            tuple(vocab_size for quantizer in self.quantizers for vocab_size in quantizer.vocab_sizes),
        )
        self.prior = Uniform(PriorConfig(spec=self.spec))

    def forward(self, images: Tensor, step: int | None = None) -> TokenizerOutput:
        self.check_images(images)
        latents, codes, losses = [], [], {}
        for level, features in enumerate(self._features(images)):
            quantized = self.quantizers[level](self._join(level, features, latents), step)
            latents.append(self.from_quantizers[level](quantized.z))
            codes += quantized.codes
            losses |= {f"{name}_{level}": loss for name, loss in quantized.losses.items()}
        params = self._params(latents)
        losses = {**self.likelihood.losses(params, images), **losses}
        return TokenizerOutput(self.likelihood.mean(params), tuple(codes), losses)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False) -> Codes:
        self.check_images(images)
        latents, codes = [], []
        for level, features in enumerate(self._features(images)):
            quantizer = self.quantizers[level]
            level_codes = quantizer.encode(self._join(level, features, latents), sample)
            if level < len(self.quantizers) - 1:  # nobody asks for the finest one's
                latents.append(self._latent(level, quantizer.embed(level_codes)))
            codes += level_codes
        return tuple(codes)

    @torch.no_grad()
    def decode(self, codes: Codes, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        return self.decode_embedded(self.embed(codes))

    @property
    def code_strides(self) -> tuple[int, ...]:
        factors = self.config.downsample_factors
        return tuple(factor for factor, q in zip(factors, self.quantizers) for _ in q.vocab_sizes)

    @torch.no_grad()
    def embed(self, codes: Codes) -> tuple[Tensor, ...]:
        self.spec.check(codes)
        return self._embed(codes)

    @torch.no_grad()
    def decode_embedded(self, vectors: tuple[Tensor, ...]) -> Tensor:
        return self.likelihood.mean(self._params(self._latents(vectors)))

    def nll(self, images: Tensor, codes: Codes) -> Tensor:
        self.check_images(images)
        self.spec.check(codes)
        return self.likelihood.nll(self._params(self._latents(self._embed(codes))), images)

    @property
    def is_stochastic(self) -> bool:
        return any(quantizer.is_stochastic for quantizer in self.quantizers)

    @torch.no_grad()
    def draw_posterior(self, images: Tensor) -> PosteriorDraw:
        self.check_images(images)
        latents, codes, log_q = [], [], []
        for level, features in enumerate(self._features(images)):
            quantizer = self.quantizers[level]
            level_codes, level_log_q = quantizer.draw(self._join(level, features, latents))
            latents.append(self._latent(level, quantizer.embed(level_codes)))
            codes += level_codes
            log_q.append(level_log_q)
        return PosteriorDraw(tuple(codes), sum(log_q), -self.nll(images, tuple(codes)))

    def initialize(self, images: Tensor) -> None:
        initialize_by_data(self, images, dict(zip(self.to_quantizers, self.quantizers)), self.decoders[-1][-1])

    def after_step(self) -> None:
        for quantizer in self.quantizers:
            quantizer.after_step()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Per level, coarse to fine: (B, latent_dim, h, w)."""
        features = [to_channels_last(2 * pad_to_multiple(images, self.config.downsample_factors[0]) - 1)]
        for encoder in reversed(self.encoders):
            features.insert(0, encoder(features[0]))
        return features[:-1]

    def _join(self, level: int, features: Tensor, latents: list[Tensor]) -> Tensor:
        """What `level` quantizes: its features, joined with the decoded level above."""
        if level > 0:
            features = torch.cat([self.decoders[level - 1](latents[level - 1]), features], dim=1)
        return self.to_quantizers[level](features)

    def _embed(self, codes: Codes) -> tuple[Tensor, ...]:
        codes = iter(codes)
        return tuple(q.embed(tuple(next(codes) for _ in q.vocab_sizes)) for q in self.quantizers)

    def _latents(self, vectors: tuple[Tensor, ...]) -> list[Tensor]:
        return [self._latent(level, z) for level, z in enumerate(vectors)]

    def _latent(self, level: int, z: Tensor) -> Tensor:
        from_quantizer = self.from_quantizers[level]
        return from_quantizer(z.to(from_quantizer.weight.dtype))  # quantizers without weights give float32

    def _params(self, latents: list[Tensor]) -> Tensor:
        _, height, width = self.config.image_shape
        factors = self.config.downsample_factors
        finest = [
            F.interpolate(z, scale_factor=factor // factors[-1]) if factor > factors[-1] else z
            for z, factor in zip(latents, factors)
        ]
        return self.decoders[-1](torch.cat(finest, dim=1))[:, :, :height, :width]

"""What a tokenizer is: an autoencoder p(x | codes), q(codes | x), with the prior it assumes while training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prior.base import Codes, CodeSpec, Prior


class TokenizerOutput(NamedTuple):
    """Result of a training pass.

    images: (B, C, H, W) reconstruction in [0, 1]; codes: one tensor per level; losses: scalars, already
    weighted, whose sum is minimised.
    """

    images: Tensor
    codes: Codes
    losses: dict[str, Tensor]


class PosteriorDraw(NamedTuple):
    """One draw of the codes z of each image from q(z | x), with what an importance weight is made of.

    log p(x) >= E log mean exp over draws of (log_likelihood + log p(codes) - log_q), in nats, for any prior p(codes).

    codes: one tensor per level; log_q: (B,) log q(codes | x), 0 where the encoder is deterministic;
    log_likelihood: (B,) log p(x | codes), or log p(x, h | codes) - log q(h | x, codes) of a draw of h for decoders with
    latents h of their own.
    """

    codes: Codes
    log_q: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What every tokenizer's configuration holds.

    Args:
        image_shape: (C, H, W), taken from the data.
        preprocessing: how files became images of that shape. The model never reads it; it travels with the model so
            that new images are treated alike, and so that it counts in the tokenizer's fingerprint.
    """

    image_shape: tuple[int, int, int]
    preprocessing: dict = field(default_factory=dict)

    def __post_init__(self):
        shape = self.image_shape
        object.__setattr__(self, "image_shape", tuple(shape) if isinstance(shape, Sequence) else ())  # JSON gives lists
        if len(self.image_shape) != 3 or self.image_shape[0] not in (1, 3) or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be (1 or 3, height, width), got {shape}")


class Tokenizer(nn.Module, ABC):
    """An autoencoder with codes. Images are (B, C, H, W) in [0, 1] at every boundary.

    A subclass sets `Config` and `parts` (which of its configuration's fields are {"type": ...} dicts, and the registry
    that each is built from), and in its constructor `spec` and `prior`. One that is conditional on classes sets
    `num_classes` too: its codes hold the class, its prior is conditional on it, and `forward` takes int64 labels (B,)
    as a third argument while training. One whose feature maps have their channels side by side in memory says so by
    `channels_last`.
    """

    Config: type[TokenizerConfig]
    parts: ClassVar[dict[str, dict[str, type]]] = {}
    spec: CodeSpec
    prior: Prior
    num_classes: int = 0
    channels_last: ClassVar[bool] = False

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        # Weights that were trained before are not changed to suit the data that training goes on with
        self.starts_from_data = True
        self.register_load_state_dict_post_hook(_start_from_weights)

    @classmethod
    def from_pretrained(cls, path_or_id: str, **options) -> "Tokenizer":
        """Loads a model folder or hub repository, in evaluation mode.

        Args:
            path_or_id: folder, or "user/name" on the hub.
            options: subfolder ("tokenizer" where it is a pipeline's); device (default the CPU); dtype or
                its name (default, and "auto", as saved); revision, cache_dir, token, local_files_only and
                force_download for the hub.
        Raises:
            ValueError: it is damaged, or holds another class.
        """
        from pipelines.checkpoint import load_pretrained  # for convenience, here alone: models know no files

        return load_pretrained(cls, path_or_id, **options)

    def save_pretrained(self, folder: str) -> None:
        """Writes a model folder: config.json and model.safetensors."""
        from pipelines.checkpoint import save_model

        save_model(self, folder)

    @abstractmethod
    def forward(self, images: Tensor, step: int | None = None) -> TokenizerOutput:
        """Reconstructs and scores; `step` drives annealing schedules, None means fully annealed."""

    @abstractmethod
    def encode(self, images: Tensor, sample: bool = False) -> Codes:
        """The mode of q(codes | x), or a draw from it; for deterministic encoders the same thing."""

    @abstractmethod
    def decode(self, codes: Codes, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """The mean of p(x | codes), (B, C, H, W) in [0, 1].

        `generator`, one or one per image, is for decoders with latents of their own.
        """

    @abstractmethod
    def nll(self, images: Tensor, codes: Codes) -> Tensor:
        """-log p(x | codes) of the discrete pixels, in nats, shape (B,)."""

    @property
    def is_stochastic(self) -> bool:
        """Whether `draw_posterior` differs from draw to draw."""
        return type(self).draw_posterior is not Tokenizer.draw_posterior

    @property
    def has_local_latents(self) -> bool:
        """Whether `decode` draws latents of its own, so that equal codes give different images."""
        return False

    @torch.no_grad()
    def draw_posterior(self, images: Tensor) -> PosteriorDraw:
        """A draw from q(codes | x) and its importance weight; here that of a deterministic encoder.

        Draws with torch's global generator; tokenizers with a stochastic encoder override it.
        """
        codes = self.encode(images)
        log_likelihood = -self.nll(images, codes)
        return PosteriorDraw(codes, torch.zeros_like(log_likelihood), log_likelihood)

    @property
    def code_strides(self) -> tuple[int, ...] | None:
        """Pixels between neighbouring codes of each level, along both sides; None where codes have no place.

        Code (i, j) of a level with stride f stands for the square of pixels from (i f, j f) up to, not including,
        ((i + 1) f, (j + 1) f); maps begin at the image's upper left corner and may reach beyond its lower right one.
        Both networks also look at pixels and codes around it, so that this is its place and not all that it sees.
        """
        return None

    def embed(self, codes: Codes) -> tuple[Tensor, ...]:
        """The vectors (B, D, h, w) that codes stand for, one per quantizer: decode_embedded(embed(c)) = decode(c).

        Raises:
            ValueError: this tokenizer's codes stand for no vectors.
        """
        raise ValueError(f"the codes of {type(self).__name__} stand for no vectors that could be mixed")

    def decode_embedded(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """The mean of p(x | vectors), as `decode`; for mixtures of codes too."""
        raise ValueError(f"the codes of {type(self).__name__} stand for no vectors that could be mixed")

    def draw_posteriors(self, images: Tensor, num_draws: int) -> Iterator[PosteriorDraw]:
        """`draw_posterior` time after time; what does not depend on the draw may be computed once."""
        for _ in range(num_draws):
            yield self.draw_posterior(images)

    def scores(self, images: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """Values per image (B,) that validation reports of an output in evaluation mode; "nll" is what is kept best by.

        Here nll is the decoder's, in nats/dim, at the codes that the image was encoded to.
        """
        return {"nll": self.nll(images, output.codes) / images.shape[1:].numel()}

    def complaints(self) -> dict[str, str]:
        """What is wrong with the latents beyond their counts, by subject; with numbers and advice."""
        return {}

    def initialize(self, images: Tensor) -> None:
        """Initialisation that depends on data (codebooks); a no-op where there is none.

        Training calls it where `starts_from_data`: not after weights were loaded, nor twice.
        """

    def after_step(self) -> None:
        """To be called once after each optimizer step: codebooks that follow running averages move here."""

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless images are (B, C, H, W) of the tokenizer's own shape, and floating-point.

        Their range is looked at when evaluating only: on a GPU that look would keep each training step waiting.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"this tokenizer takes images of shape (batch, {', '.join(map(str, self.config.image_shape))}), "
                f"got {tuple(images.shape)}"
            )
        looked_at = not self.training and not torch.compiler.is_compiling() and images.numel() > 0
        if not images.is_floating_point() or (looked_at and not ((images >= 0) & (images <= 1)).all()):
            values = f"from {images.min().item():.5g} to {images.max().item():.5g}" if images.numel() else ""
            raise ValueError(f"images must be floating-point in [0, 1], got {images.dtype} {values}")


def _start_from_weights(tokenizer: Tokenizer, incompatible_keys) -> None:
    tokenizer.starts_from_data = False

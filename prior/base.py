"""What a distribution over codes is: the space (`CodeSpec`), the contract (`Prior`) and its options."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prior.sampling import ImageNoise, SamplingOptions

Codes = tuple[Tensor, ...]


@dataclass(frozen=True)
class CodeSpec:
    """The space that codes live in: one integer array per level, coarse to fine.

    Args:
        shapes: shape of each level without the batch, e.g. ((8, 8),), ((32, 32), (64, 64)) or ((200,),).
        vocab_sizes: number K of values of each level; the entries of level l lie in [0, K_l).
    Raises:
        ValueError: no level, a level without a vocabulary, or a size below 1.
    """

    shapes: tuple[tuple[int, ...], ...]
    vocab_sizes: tuple[int, ...]

    def __post_init__(self):
        # JSON and YAML give lists
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        object.__setattr__(self, "vocab_sizes", tuple(self.vocab_sizes))
        if not self.shapes or len(self.shapes) != len(self.vocab_sizes):
            raise ValueError(
                f"a code space needs one vocabulary size per level and at least one level, "
                f"got shapes {self.shapes} and vocab_sizes {self.vocab_sizes}"
            )
        sizes = [*self.vocab_sizes, *(size for shape in self.shapes for size in shape)]
        if any(not isinstance(size, int) or size < 1 for size in sizes) or not all(self.shapes):
            raise ValueError(f"code sizes must be integers of at least 1, got {self}")

    @property
    def num_levels(self) -> int:
        return len(self.shapes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Codes per image of each level."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def length(self) -> int:
        """Codes per image, N."""
        return sum(self.lengths)

    @property
    def max_nats(self) -> float:
        """Nats per image under the uniform distribution: sum of log K over all codes."""
        return sum(n * math.log(k) for n, k in zip(self.lengths, self.vocab_sizes))

    def check(self, codes: Codes) -> None:
        """Raises ValueError if `codes` are not int64 arrays of this space (shapes, dtype, range)."""
        if len(codes) != self.num_levels:
            raise ValueError(f"got codes of {len(codes)} levels, this code space has {self.num_levels}: {self}")
        for level, (code, shape, vocab_size) in enumerate(zip(codes, self.shapes, self.vocab_sizes)):
            if tuple(code.shape[1:]) != shape or code.dtype != torch.int64:
                raise ValueError(
                    f"level {level} of the codes must be int64 of shape (batch, {', '.join(map(str, shape))}), "
                    f"got {code.dtype} of shape {tuple(code.shape)}"
                )
            if code.numel() and (code.min() < 0 or code.max() >= vocab_size):
                raise ValueError(
                    f"level {level} of the codes must lie in [0, {vocab_size}), "
                    f"got values from {code.min().item()} to {code.max().item()}"
                )
        batches = [code.shape[0] for code in codes]
        if len(set(batches)) > 1:
            raise ValueError(f"all levels must hold the same number of images, got {batches}")

    def flatten(self, codes: Codes) -> Tensor:
        """(B, N): all levels as one sequence, coarse to fine, each in raster order."""
        return torch.cat([code.flatten(1) for code in codes], dim=1)

    def unflatten(self, sequence: Tensor) -> Codes:
        """The inverse of `flatten`."""
        parts = sequence.split(self.lengths, dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes))


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What every prior's configuration holds.

    Args:
        spec: the code space, taken from the codes.
        num_classes: number of class labels; 0 for an unconditional prior.
        tokenizer_fingerprint: hash of the tokenizer whose codes the prior was trained on.
    Raises:
        ValueError: num_classes is negative.
    """

    spec: CodeSpec
    num_classes: int = 0
    tokenizer_fingerprint: str = ""

    def __post_init__(self):
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0 (0: unconditional), got {self.num_classes}")


def check_positive(config: PriorConfig, *names: str) -> None:
    """Raises ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_fraction(config: PriorConfig, *names: str) -> None:
    """Raises ValueError unless the named fields lie in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is a probability in [0, 1), got {getattr(config, name)}")


class Prior(nn.Module, ABC):
    """A distribution p(codes) or p(codes | label) over a `CodeSpec`.

    A subclass sets `Config`, names the sampling options it honours, and writes `log_prob` and `_sample`.
    Labels are given if and only if `num_classes > 0`.
    """

    Config: type[PriorConfig] = PriorConfig
    sampling_options: frozenset[str] = frozenset()

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        self.spec = config.spec
        self.num_classes = config.num_classes

    @classmethod
    def from_pretrained(cls, path_or_id: str, **download_options) -> "Prior":
        """Loads a model folder or hub repository. Raises ValueError if it is damaged, or holds another class."""
        from pipelines.checkpoint import load_pretrained  # here alone, for the hand's habit: models know no files

        return load_pretrained(cls, path_or_id, **download_options)

    def save_pretrained(self, folder: str) -> None:
        """Writes a model folder: config.json and model.safetensors."""
        from pipelines.checkpoint import save_model

        save_model(self, folder)

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Named training losses whose sum is minimised: here the negative log-likelihood in nats per code."""
        return {"nll": -self.log_prob(codes, labels).mean() / self.spec.length}

    @abstractmethod
    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """log p(codes | labels) in nats, shape (B,). Never drops the condition, whatever the training mode."""

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        given: tuple[Codes, Codes] | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Codes:
        """Draws codes.

        Args:
            num_samples: number of images B.
            labels: (B,) int64 class labels, if and only if the prior is class-conditional.
            temperature: divides the logits; 0 takes the most probable code each time.
            top_k: keep only the k most probable codes at each position.
            top_p: keep the smallest set of codes whose probability reaches p (nucleus sampling).
            guidance_scale: classifier-free guidance (Ho & Salimans 2022); 1 is off.
            generator: one for the batch, or one per image. Image i then depends on its own generator alone,
                whatever the batch size. None takes fresh seeds from torch's default generator.
            given: (codes, known) per level: codes kept where the boolean `known` is true (completion).
            callback: called as callback(done, total) while the codes arrive.
        Returns:
            one int64 tensor (B, *shape) per level.
        Raises:
            ValueError: an option out of range, or one that this prior cannot honour.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        options = SamplingOptions(temperature, top_k, top_p, guidance_scale)
        self._check_options(options, given)
        self.check_labels(labels, num_samples)
        device = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).device
        if labels is not None:
            labels = labels.to(device)
        if given is not None:
            given = self._check_given(given, num_samples, device)
        noise = ImageNoise(num_samples, generator, device)
        training = self.training
        self.eval()
        try:
            return self._sample(num_samples, labels, options, noise, given, callback or (lambda done, total: None))
        finally:
            self.train(training)

    @abstractmethod
    def _sample(
        self,
        num_samples: int,
        labels: Tensor | None,
        options: SamplingOptions,
        noise: ImageNoise,
        given: tuple[Codes, Codes] | None,
        callback: Callable[[int, int], None],
    ) -> Codes:
        """`sample` with everything checked, labels and given codes on the prior's device, in evaluation mode."""

    def check_inputs(self, codes: Codes, labels: Tensor | None) -> None:
        """Raises ValueError unless the codes are of this prior's space and the labels fit them."""
        self.spec.check(codes)
        self.check_labels(labels, codes[0].shape[0])

    def check_labels(self, labels: Tensor | None, num_samples: int) -> None:
        """Raises ValueError unless labels are given exactly when they are needed, in number and range."""
        if self.num_classes == 0:
            if labels is not None:
                raise ValueError("this prior is unconditional (num_classes = 0), but labels were given")
            return
        if labels is None:
            raise ValueError(f"this prior is conditional on {self.num_classes} classes: give labels")
        if labels.shape != (num_samples,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of shape ({num_samples},), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.numel() and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), "
                f"got values from {labels.min().item()} to {labels.max().item()}"
            )

    def _check_options(self, options: SamplingOptions, given) -> None:
        asked = options.names_set() | ({"given"} if given is not None else set())
        unsupported = sorted(asked - self.sampling_options)
        if unsupported:
            raise ValueError(
                f"{type(self).__name__} cannot honour {', '.join(unsupported)}; "
                f"it supports {', '.join(sorted(self.sampling_options)) or 'no sampling options'}"
            )
        if options.guidance_scale != 1.0 and self.num_classes == 0:
            raise ValueError(
                f"guidance_scale = {options.guidance_scale} needs a class-conditional prior; this one has no classes"
            )

    def _check_given(self, given, num_samples: int, device) -> tuple[Codes, Codes]:
        codes, known = (tuple(part.to(device) for part in parts) for parts in given)
        self.spec.check(codes)
        if len(known) != len(codes) or any(k.shape != c.shape or k.dtype != torch.bool for k, c in zip(known, codes)):
            shapes = [tuple(mask.shape) for mask in known]
            raise ValueError(f"given needs one boolean mask per level, each of the shape of its codes, got {shapes}")
        if codes[0].shape[0] != num_samples:
            raise ValueError(f"given holds {codes[0].shape[0]} images, num_samples is {num_samples}")
        return codes, known

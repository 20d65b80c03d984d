"""From logits to codes: temperature, top-k, top-p, guidance, and noise that belongs to each image alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become a distribution to draw from; see `Prior.sample` for the meaning of each field.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None to keep every code, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be None to keep every code, got {self.top_p}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be finite and at least 0, got {self.guidance_scale}")
        if self.top_p == 1:
            # the whole distribution: not an option at all, so that every prior can honour it
            object.__setattr__(self, "top_p", None)

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    def names_set(self) -> set[str]:
        """Names of the options that differ from their default."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}


def choose(logits: Tensor, options: SamplingOptions, uniform: Tensor) -> Tensor:
    """Codes (B,) from the logits of one position.

    Args:
        logits: (B, K); with guidance (2 B, K), the conditional ones first.
        options: how to change the distribution that the logits stand for.
        uniform: (B,) noise in [0, 1), each image's own.
    """
    if options.guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, options.guidance_scale)
    return draw(filter_logits(logits, options), uniform)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) of logits, in float32.

    The scale is that of p(c | label)^scale p(c)^(1 - scale): 0 is unconditional, 1 conditional; the paper's w is
    scale - 1.
    """
    unconditional = unconditional.float()
    return unconditional + scale * (conditional.float() - unconditional)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (..., K) in float32 with temperature, then top-k, then top-p applied: the order of `transformers`.

    Codes that are filtered out get minus infinity; at least one code is kept. Codes that tie with the k-th are kept
    too, so that the result does not depend on a device's order of sorting; for top-p, and for the single code of
    temperature 0, the lower of two equal codes comes first.
    """
    logits = logits.float()
    # the largest is 0 from here on, so a small temperature sends the others to -inf and never overflows
    logits = logits - logits.amax(-1, keepdim=True)
    if options.temperature <= torch.finfo(torch.float32).tiny:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / options.temperature
    if options.top_k is not None:
        # topk, not sort: K is often 16384 and k some hundreds
        kept = logits.topk(min(options.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[..., -1:], -torch.inf)
    if options.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # 0 for the first, which is hence always kept
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= options.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Codes (B,) from logits (B, K) and noise (B,) in [0, 1] by the inverse of the cumulative distribution.

    The same noise gives the same codes on every device, up to rounding, unlike `torch.multinomial`; a code of
    probability zero is never drawn.
    """
    probabilities = logits.float().softmax(-1)
    # impossible codes stay at 0 and cannot be the first to exceed the target; that a parallel cumsum need not be
    # monotone does not matter either, because the target lies below the largest value
    cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)
    largest = cumulative.amax(-1, keepdim=True)
    # u (1 - 2^-24) rounds to less than its other factor in float32, also for u = 1
    target = uniform[:, None].float().clamp(max=1 - 2**-24) * largest
    return (cumulative > target).int().argmax(-1)  # the first


class ImageNoise:
    """Uniform noise that each image draws from its own generator.

    One generator for the whole batch only draws one seed per image from it, so that image i is the same in a batch of
    any size. Generators live on the CPU by preference: then a picture is the same on every device.

    Raises:
        ValueError: neither a generator nor a list of as many as there are images.
    """

    def __init__(
        self,
        num_images: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
    ):
        self.device = device
        if generator is None or isinstance(generator, torch.Generator):
            source = torch.device("cpu") if generator is None else generator.device
            seeds = torch.randint(2**62, (num_images,), generator=generator, device=source).tolist()
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        elif isinstance(generator, Sequence):
            self.generators = list(generator)
        else:
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if len(self.generators) != num_images:
            raise ValueError(f"got {len(self.generators)} generators for {num_images} images: give one, or one each")

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) numbers in [0, 1), row i from the generator of image i."""
        draws = [torch.rand(shape, generator=g, device=g.device, dtype=torch.float32) for g in self.generators]
        return torch.stack([draw.to(self.device) for draw in draws])
